//go:build engines

package engines

import (
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/certfile/certtest"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// mirrored is an encrypted image in a registry, and a mirror of that.
type mirrored struct {
	ci          *harness.CI
	image       string // in the registry
	address     string // of the mirror
	cert, key   string // of the mirror, its callers, and their CA
	tag, digest string // the image's names in the mirror
	greeting    string // that it prints
	secretFile  string
}

// newMirrored starts pilot with a mirror that takes callers with the secret, and with a
// certificate if it has TLS.
func newMirrored(t testing.TB, hasTLS bool) mirrored {
	t.Helper()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	image := c.Image(harness.LayerKinds[1], "provider:pilot:team-a")
	m := mirrored{ci: c, image: image, address: loopbacktest.FreeAddress(t), secretFile: dir + "/secret", greeting: "hello, " + c.Secrets[image]}
	args := []string{"--mirror-listen", m.address, "--mirror-upstream", c.Registry}
	if hasTLS {
		ca := certtest.NewAuthority(t)
		files := ca.Issue(t, certtest.Named("mirror"))
		m.cert, m.key = files.Cert, files.Key
		harness.Write(t, files.Cert, harness.Read(t, files.Cert)+harness.Read(t, ca.File))
		args = append(args, "--tls-cert", m.cert, "--tls-key", m.key, "--tls-client-ca", ca.File)
	}
	harness.StartPilot(t, dir+"/mirror", c.BrokerURL, append(args, "--mirror-secret-file", m.secretFile)...)
	harness.Await(t, "the mirror", harness.Listening(m.address))
	m.tag = strings.Replace(image, c.Registry, m.address, 1)
	repository, _, _ := strings.Cut(strings.TrimPrefix(m.tag, m.address+"/"), ":")
	m.digest = m.address + "/" + repository + "@" + c.Target(image+"-plain")
	return m
}

// TestBuildKitBuildsFromMirror builds on an encrypted image with a containerd that knows
// nothing of pilot, with a cache in the registry, and encrypts what it has built.
func TestBuildKitBuildsFromMirror(t *testing.T) {
	t.Parallel()
	m := newMirrored(t, true)
	n := harness.StartNode(t, harness.TempDir(t), harness.Containerd2(), "", "")
	n.Ocicrypt = m.ci.Ocicrypt
	b := newBuilder(t, n, m.ci.Registry, fmt.Sprintf("[registry.'%s']\n  http = false\n  ca = ['%s']\n  [[registry.'%s'.keypair]]\n    cert = '%s'\n    key = '%s'\n", m.address, m.cert, m.address, m.cert, m.key))
	for _, image := range []string{m.tag, m.digest} {
		says(t, b.build("FROM "+image+"\nRUN [\"/hello\"]\nCOPY --from="+image+" /secret /copy\n", nil, "--no-cache"), m.greeting)
	}

	// The cache is as plain as what is built, and complete.
	cache := m.ci.Registry + "/cache:1"
	dockerfile, files := "FROM "+m.digest+"\nRUN [\"/hello\"]\nCOPY top /top\n", map[string]string{"top": harness.NewSecret()}
	says(t, b.build(dockerfile, files, "--no-cache", "--export-cache", "type=registry,mode=max,ref="+cache), m.greeting)
	for _, l := range manifestOf(m.ci, cache).Layers {
		if strings.Contains(l.MediaType, "encrypted") {
			t.Errorf("the cache has %+v", l)
		}
	}
	b.forget(t)
	says(t, b.build(dockerfile+"RUN [\"/hello\"]\n", files, "--import-cache", "type=registry,ref="+cache), "CACHED", m.greeting)

	// Encrypted like the base, the result has the base's layers as the registry has them.
	local, built := m.ci.Registry+"/built:plain", m.ci.Registry+"/built:1"
	says(t, b.build(dockerfile, files, "--output", "type=image,name="+local))
	harness.Output(t, b.in("images", "encrypt", "--recipient", "provider:pilot:team-a", "--like", "docker://"+m.image, "--plain-http", local, built))
	harness.Output(t, b.in("images", "push", "--plain-http", built))
	base, result := manifestOf(m.ci, m.image).Layers, manifestOf(m.ci, built).Layers
	if len(result) != len(base)+2 {
		t.Errorf("it has the layers %+v", result)
	}
	for i, l := range result {
		if !strings.HasSuffix(l.MediaType, "+encrypted") || i < len(base) && l.Digest != base[i].Digest {
			t.Errorf("layer %d: %+v", i, l)
		}
	}
	says(t, b.build("FROM "+strings.Replace(built, m.ci.Registry, m.address, 1)+"\nRUN [\"/hello\"]\n", nil), m.greeting)
}

// TestDockerPullsFromMirror has Debian 13's Docker, with its own image store and without
// pilot, and Docker 29 pull and run an encrypted image after docker login. They read no
// client certificates for addresses of the machine's own.
func TestDockerPullsFromMirror(t *testing.T) {
	t.Parallel()
	withTLS, plain := newMirrored(t, true), newMirrored(t, false)
	for name, machine := range map[string]func(*testing.T) *harness.Machine{
		"26.1": func(t *testing.T) *harness.Machine {
			return harness.NewMachine(t, filepath.Join(harness.Tools, "trixie"))
		},
		"29": func(t *testing.T) *harness.Machine {
			m := harness.Machines()["2.4.2"](t)
			for _, name := range []string{"dockerd", "docker", "runc"} {
				m.AddProgram(filepath.Join(harness.Tools, "docker", name))
			}
			return m
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := machine(t)
			m.Mount(harness.TempDir(t), "var/lib/docker", "", syscall.MS_BIND, "")
			e := &engine{t: t, m: m, node: &harness.Node{T: t, Socket: m.Root + "/run/containerd/containerd.sock"}}
			if name == "29" {
				e.args = []string{"--containerd", "/run/containerd/containerd.sock"}
				e.serveContainerd()
			}
			e.serveDocker("{}")
			for _, from := range []mirrored{withTLS, plain} {
				login := e.docker("login", "--username", "pilot", "--password-stdin", from.address)
				login.Stdin = strings.NewReader(harness.Read(t, from.secretFile))
				harness.Output(t, login)
				for _, image := range []string{from.tag, from.digest} {
					harness.Output(t, e.docker("pull", "-q", image))
					if out := harness.Output(t, e.docker("run", "--rm", "--network", "none", image)); !strings.Contains(out, from.greeting) {
						t.Errorf("%s prints %s", image, out)
					}
				}
				harness.Output(t, e.docker("logout", from.address))
				harness.Output(t, e.docker("image", "rm", "--force", from.tag))
				harness.ExpectFailure(t, e.docker("pull", from.tag))
			}
		})
	}
}

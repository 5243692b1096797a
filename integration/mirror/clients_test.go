package mirror

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestSkopeoPodmanAndBuildahPull has Debian 13's tools, without any key, pull by tag and by
// plain digest, with the secret as password and with a client certificate.
func TestSkopeoPodmanAndBuildahPull(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	certs := newCertificates(t)
	n.start()
	d := harness.NewDebian(t, n.dir, "/nonexistent")
	dir := filepath.Join(n.dir, "certs")
	for name, from := range map[string]string{"ca.crt": certs.ca.File, "client.cert": certs.client.Cert, "client.key": certs.client.Key} {
		harness.Write(t, filepath.Join(dir, name), harness.Read(t, from))
	}
	secret := harness.NewSecret()
	layout, plain := n.plain(harness.LayerKinds[2], secret)
	n.encrypt(layout, "team/app:enc")

	bySecret := []string{"--tls-verify=false", "--creds", "pilot:" + n.secret}
	pull := func(t *testing.T, arguments []string) {
		t.Helper()
		prefixed := func(prefix string) (out []string) {
			for _, a := range arguments {
				out = append(out, strings.Replace(a, "--", "--"+prefix, 1))
			}
			return out
		}
		for _, name := range []string{"team/app:enc", "team/app@" + plain} {
			image := n.mirror + "/" + name
			to := filepath.Join(n.dir, "pulled"+harness.SHA256(fmt.Sprint(arguments, name))[:8])
			harness.Output(t, d.Run("skopeo", append(append([]string{"copy", "-q"}, prefixed("src-")...), "docker://"+image, "oci:"+to+":v1")...))
			for _, digest := range append(layers(t, harness.Read(t, file(layout, plain))), plain) {
				if harness.Read(t, file(to, digest)) != harness.Read(t, file(layout, digest)) {
					t.Errorf("skopeo has another %s of %s", digest, name)
				}
			}
			if raw := harness.Output(t, d.Run("skopeo", append(append([]string{"inspect", "--raw"}, arguments...), "docker://"+image)...)); digestOf(raw) != plain {
				t.Errorf("skopeo inspects %s, not %s", digestOf(raw), plain)
			}
			for _, tool := range []string{"podman", "buildah"} {
				id := strings.TrimSpace(harness.Output(t, d.Run(tool, append(append([]string{"pull", "-q"}, arguments...), image)...)))
				if got := strings.TrimSpace(harness.Output(t, d.Run("podman", "image", "inspect", "--format", "{{.Digest}}", id))); got != plain {
					t.Errorf("%s stored %s as %s", tool, name, got)
				}
				harness.Output(t, d.Run(tool, "rmi", "-f", id))
			}
		}
	}
	pull(t, bySecret)
	harness.ExpectFailure(t, d.Run("skopeo", "copy", "--src-tls-verify=false", "docker://"+n.mirror+"/team/app:enc", "oci:"+n.dir+"/refused:v1"), "does not know the caller")
	n.pilot.Stop(t)

	n.startWith(n.registry, certs.args()...)
	pull(t, []string{"--cert-dir", dir})
	if err := os.Remove(filepath.Join(dir, "client.key")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "client.cert")); err != nil {
		t.Fatal(err)
	}
	harness.ExpectFailure(t, d.Run("skopeo", "copy", "--src-cert-dir", dir, "docker://"+n.mirror+"/team/app:enc", "oci:"+n.dir+"/refused:v1"), "certificate required")
}

// TestBuildahCompressesAndEncryptsAtOnce has an image whose keys are wrapped with the
// digests of uncompressed layers, and which is compressed.
func TestBuildahCompressesAndEncryptsAtOnce(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	f := newFaulty(t, n.registry)
	n.startWith(f.address, "--mirror-secret-file", n.dir+"/secret")
	n.secret = strings.TrimSpace(harness.Read(t, n.dir+"/secret"))
	d := harness.NewDebian(t, n.dir, n.ociConf)
	secret := harness.NewSecret()
	layout, _ := n.plain(harness.LayerKinds[1], secret)
	id := strings.TrimSpace(harness.Output(t, d.Run("buildah", "pull", "-q", "oci:"+layout+":v1")))
	harness.Output(t, d.Run("buildah", "push", "-q", "--tls-verify=false", "--encryption-key", "provider:pilot:team-a", id, "docker://"+n.registry+"/app:enc"))

	// A caller that has not the patience for the reading of the layers finds it done later.
	resume := make(chan struct{})
	f.set(func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
		if strings.Contains(r.URL.Path, "/blobs/") {
			<-resume
		}
		forward.ServeHTTP(w, r)
	})
	conn := n.stuck(manifestPath("app", "enc"))
	harness.Await(t, "the mirror reads a blob", func() error {
		if len(f.requests("/blobs/")) == 0 {
			return errors.New("not yet")
		}
		return nil
	})
	conn.Close()
	close(resume)
	r := n.get(manifestPath("app", "enc"))
	r.expect(t, "manifest", http.StatusOK, "tar+gzip\"")
	for _, layer := range n.encryptedLayers("app", "enc") {
		if asked := f.requests("GET " + blobPath("app", layer)); len(asked) != 1 {
			t.Errorf("a layer was read by %q", asked)
		}
	}
	for _, layer := range layers(t, r.body) {
		if b := n.get(blobPath("app", layer)); b.status != http.StatusOK || digestOf(b.body) != layer {
			t.Errorf("layer %s: %d, %s", layer, b.status, digestOf(b.body))
		}
	}
	harness.Output(t, d.Run("podman", "pull", "-q", "--tls-verify=false", "--creds", "pilot:"+n.secret, n.mirror+"/app:enc"))
}

// TestContainerdPullsByHostsToml has containerd pull by tag and plain digest, with the
// mirror in hosts.toml, by client certificate and by header. The name of the registry says
// nothing about its address: the mirror has that from its own directory.
func TestContainerdPullsByHostsToml(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	certs := newCertificates(t)
	n.startByName(certs.args()...)
	secret := harness.NewSecret()
	layout, plain := n.image("plain", func(l *harness.Layout) harness.Object { return l.Index(harness.LayerKinds[1], secret) })
	n.encrypt(layout, "team/app:enc")

	hosts := map[string]string{
		"certificate": fmt.Sprintf("client = [['%s', '%s']]\n", certs.client.Cert, certs.client.Key),
		"header":      fmt.Sprintf("[host.'https://%s'.header]\npilot-secret = '%s'\n", n.mirror, n.secret),
		"neither":     "",
	}
	for name, more := range hosts {
		harness.Write(t, filepath.Join(n.dir, name, "registry.test/hosts.toml"), fmt.Sprintf("server = 'https://%s'\nca = '%s'\n[host.'https://%s']\ncapabilities = ['pull', 'resolve']\nca = '%s'\n%s", n.mirror, certs.ca.File, n.mirror, certs.ca.File, more))
	}
	for _, v := range []harness.ContainerdVersion{harness.Containerd16(), harness.Containerd17(), harness.Containerd2()} {
		t.Run(v.Name, func(t *testing.T) {
			for name := range hosts {
				plugin := "io.containerd.grpc.v1.cri"
				if v.Number > 2 {
					plugin = "io.containerd.cri.v1.images"
				}
				node := harness.StartNode(t, harness.TempDir(t), v, "", fmt.Sprintf("[plugins.'%s'.registry]\n  config_path = '%s'\n", plugin, filepath.Join(n.dir, name)))
				if name == "neither" {
					harness.ExpectFailure(t, node.Crictl("pull", "registry.test/team/app:enc"))
					harness.ExpectFailure(t, node.Crictl("pull", "registry.test/team/app@"+plain))
					continue
				}
				for _, image := range []string{"registry.test/team/app:enc", "registry.test/team/app@" + plain} {
					harness.Output(t, node.Crictl("pull", image))
				}
				if list := harness.Output(t, node.Ctr("-n", "k8s.io", "images", "list")); !strings.Contains(list, plain) {
					t.Errorf("%s: %s is not in\n%s", name, plain, list)
				}
				// The content store holds the plain layers.
				if !harness.ContainsText(t, filepath.Join(node.Dir, "root/io.containerd.snapshotter.v1.overlayfs"), secret) {
					t.Errorf("%s: the secret is not in the snapshots", name)
				}
			}
		})
	}
}

// TestSelfSignedPairIsEnough sets the mirror up as docs/mirror.md does: one pair, which
// only root can read, is the certificate of the mirror, of its callers, and their CA.
func TestSelfSignedPairIsEnough(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	cert, key := n.dir+"/mirror.pem", n.dir+"/mirror-key.pem"
	harness.Output(t, harness.Command(t, "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30",
		"-subj", "/CN=pilot mirror", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-keyout", key, "-out", cert))
	if info, err := os.Stat(key); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info.Mode(), err)
	}
	n.startWith(n.registry, "--tls-cert", cert, "--tls-key", key, "--tls-client-ca", cert)
	layout, plain := n.plain(harness.LayerKinds[1], harness.NewSecret())
	n.encrypt(layout, "team/app:enc")
	url := "https://" + n.mirror + manifestPath("team/app", "enc")
	if got := harness.Output(t, harness.Command(t, "curl", "-sf", "--cacert", cert, "--cert", cert, "--key", key, url)); digestOf(got) != plain {
		t.Errorf("got %s", got)
	}
	harness.ExpectFailure(t, harness.Command(t, "curl", "-sf", "--cacert", cert, url))

	d := harness.NewDebian(t, n.dir, "/nonexistent")
	dir := filepath.Join(d.Root, "etc/containers/certs.d", n.mirror)
	for name, from := range map[string]string{"ca.crt": cert, "client.cert": cert, "client.key": key} {
		harness.Write(t, filepath.Join(dir, name), harness.Read(t, from))
	}
	harness.Output(t, d.Run("podman", "pull", "-q", n.mirror+"/team/app:enc"))
}

// TestPodmanPullsByRegistriesConf has podman find the mirror by the name of the registry.
func TestPodmanPullsByRegistriesConf(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.startByName()
	layout, plain := n.plain(harness.LayerKinds[1], harness.NewSecret())
	n.encrypt(layout, "team/app:enc")
	d := harness.NewDebian(t, n.dir, "/nonexistent")
	harness.Write(t, d.Root+"/etc/containers/registries.conf", fmt.Sprintf("[[registry]]\nlocation = 'registry.test'\n[[registry.mirror]]\nlocation = '%s/registry.test'\ninsecure = true\n", n.mirror))
	harness.Output(t, d.Run("podman", "login", "--tls-verify=false", "-u", "pilot", "-p", n.secret, n.mirror))
	for _, image := range []string{"registry.test/team/app:enc", "registry.test/team/app@" + plain} {
		id := strings.TrimSpace(harness.Output(t, d.Run("podman", "pull", "-q", image)))
		if got := strings.TrimSpace(harness.Output(t, d.Run("podman", "image", "inspect", "--format", "{{.Digest}}", id))); got != plain {
			t.Errorf("%s is stored as %s", image, got)
		}
	}
}

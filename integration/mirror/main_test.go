// Package mirror tests the decrypting mirror: what it answers, and with clients that can't
// decrypt.
package mirror

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/certfile/certtest"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

func TestMain(m *testing.M) {
	os.Exit(harness.Main(m, harness.Pilot, harness.Copilot, harness.CtrPilot, harness.Hello, harness.Containerd, harness.Registry, harness.Debian13, harness.OpenSSL))
}

// node is a machine with a broker, a registry and a pilot with a mirror of it.
type node struct {
	t        testing.TB
	dir      string
	broker   string
	copilot  *harness.Process
	ociConf  string
	registry string
	storage  string
	mirror   string // HOST:PORT
	secret   string
	pilot    *harness.Process
	env      []string // of pilot mirror, which is then started in place of pilot serve
}

// newNode starts a broker with the KEK team-a and a registry, and no pilot.
func newNode(t testing.TB) *node {
	t.Helper()
	n := &node{t: t, dir: harness.TempDir(t)}
	n.copilot, n.broker = harness.StartBroker(t, n.dir+"/broker", "team-a")
	n.registry, n.storage = harness.StartRegistry(t, n.dir)
	return n
}

// certificates are those of a mirror with TLS.
type certificates struct {
	ca             *certtest.Authority
	server, client certtest.Files
}

// newCertificates makes a CA, and certificates of it for the mirror and its callers.
func newCertificates(t testing.TB) certificates {
	t.Helper()
	ca := certtest.NewAuthority(t)
	return certificates{ca, ca.Issue(t, certtest.Named("mirror")), ca.Issue(t, certtest.Named("node"))}
}

// args are pilot's.
func (c certificates) args() []string {
	return []string{"--tls-cert", c.server.Cert, "--tls-key", c.server.Key, "--tls-client-ca", c.ca.File}
}

// start starts pilot with a mirror of the registry, which callers use by secret.
func (n *node) start(args ...string) {
	n.t.Helper()
	n.startWith(n.registry, append([]string{"--mirror-secret-file", n.dir + "/secret"}, args...)...)
	n.secret = strings.TrimSpace(harness.Read(n.t, n.dir+"/secret"))
}

// startByName starts pilot with a mirror that finds the registry by the name registry.test,
// and others in the same directory.
func (n *node) startByName(args ...string) {
	n.t.Helper()
	harness.Write(n.t, n.dir+"/upstream/registry.test/hosts.toml", "server = 'http://"+n.registry+"'\n")
	n.startWith("", append([]string{"--mirror-secret-file", n.dir + "/secret", "--mirror-hosts-dir", n.dir + "/upstream"}, args...)...)
	n.secret = strings.TrimSpace(harness.Read(n.t, n.dir+"/secret"))
}

// startWith starts pilot with a mirror of an upstream.
func (n *node) startWith(upstream string, args ...string) {
	n.t.Helper()
	n.mirror = loopbacktest.FreeAddress(n.t)
	if upstream != "" {
		args = append(args, "--mirror-upstream", upstream)
	}
	args = append([]string{"--mirror-listen", n.mirror, "--admin-listen", "unix://" + n.dir + "/admin.sock"}, args...)
	if n.env == nil {
		n.pilot, n.ociConf = harness.StartPilot(n.t, n.dir, n.broker, args...)
	} else {
		cmd := exec.Command("pilot", append([]string{"mirror", "--config", "/dev/null", "--broker", n.broker}, args...)...)
		cmd.Env = append(os.Environ(), n.env...)
		n.pilot = harness.Start(n.t, n.dir, "pilot-mirror", cmd)
	}
	harness.Await(n.t, "the mirror", harness.Listening(n.mirror))
}

// encrypt encrypts the image of a layout into the registry.
func (n *node) encrypt(layout, name string, args ...string) {
	n.t.Helper()
	harness.Output(n.t, n.ctrPilot(append([]string{"images", "encrypt", "--plain-http", "--recipient", "provider:pilot:team-a"}, append(args, "oci:"+layout+":v1", "docker://"+n.registry+"/"+name)...)...))
}

func (n *node) ctrPilot(args ...string) *exec.Cmd {
	n.t.Helper()
	cmd := harness.Command(n.t, "ctr-pilot", args...)
	cmd.Env = append(os.Environ(), "OCICRYPT_KEYPROVIDER_CONFIG="+n.ociConf, "HOME="+n.dir)
	return cmd
}

// image writes an image as a layout below the node's directory, and returns the directory,
// and the digest of the image.
func (n *node) image(name string, make func(*harness.Layout) harness.Object) (layout, digest string) {
	n.t.Helper()
	l := harness.NewLayout(n.t)
	o := make(l)
	layout = filepath.Join(n.dir, name)
	digest = o["digest"].(string)
	l.Write(layout, "v1", o)
	return layout, digest
}

// plain is image with one that prints a secret.
func (n *node) plain(k harness.LayerKind, secret string) (layout, digest string) {
	n.t.Helper()
	return n.image("plain", func(l *harness.Layout) harness.Object { return l.Image(k, false, harness.Arch, secret) })
}

// reply is what a registry answers.
type reply struct {
	status int
	header http.Header
	body   string
	err    error // of reading the body
	proto  string
}

// get asks the mirror as a caller that knows the secret.
func (n *node) get(path string) reply { return n.request(http.MethodGet, path, nil) }

func (n *node) head(path string) reply { return n.request(http.MethodHead, path, nil) }

// request asks the mirror as a caller that knows the secret, unless header says otherwise.
func (n *node) request(method, path string, header http.Header) reply {
	n.t.Helper()
	if header == nil {
		header = http.Header{"Pilot-Secret": {n.secret}}
	}
	return ask(n.t, http.DefaultTransport, method, "http://"+n.mirror+path, header)
}

func ask(t testing.TB, transport http.RoundTripper, method, url string, header http.Header) reply {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), harness.Timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, values := range header {
		req.Header[name] = values
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return reply{err: err}
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return reply{resp.StatusCode, resp.Header, string(b), err, resp.Proto}
}

// expect checks the status of an answer, and that its body has each of said.
func (r reply) expect(t testing.TB, what string, status int, said ...string) {
	t.Helper()
	if r.status != status || r.err != nil {
		t.Errorf("%s: status %d (%v), want %d: %.500s", what, r.status, r.err, status, r.body)
	}
	for _, s := range said {
		if !strings.Contains(r.body, s) {
			t.Errorf("%s: want %q in %.500s", what, s, r.body)
		}
	}
}

// blobPath returns the path of a blob of a repository.
func blobPath(repository, digest string) string { return "/v2/" + repository + "/blobs/" + digest }

func manifestPath(repository, reference string) string {
	return "/v2/" + repository + "/manifests/" + reference
}

// metrics returns pilot's metrics.
func (n *node) metrics() string {
	n.t.Helper()
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", n.dir+"/admin.sock")
	}}
	return ask(n.t, transport, http.MethodGet, "http://pilot/metrics", nil).body
}

// layers returns the digests of the layers of a manifest.
func layers(t testing.TB, manifest string) (digests []string) {
	t.Helper()
	var m struct {
		Layers []struct{ Digest string }
	}
	if err := json.Unmarshal([]byte(manifest), &m); err != nil {
		t.Fatal(err)
	}
	for _, l := range m.Layers {
		digests = append(digests, l.Digest)
	}
	return digests
}

// file returns the file of a blob in a layout.
func file(layout, digest string) string {
	return filepath.Join(layout, "blobs/sha256", strings.TrimPrefix(digest, "sha256:"))
}

// digestOf returns the digest of a text.
func digestOf(text string) string { return fmt.Sprintf("sha256:%s", harness.SHA256(text)) }

func basic(user, password string) string {
	return base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
}

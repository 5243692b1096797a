package encrypt

import (
	"compress/gzip"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// blobs returns the blobs of a layout, uncompressed, as one string.
func blobs(t testing.TB, dir string) string {
	t.Helper()
	var all strings.Builder
	err := filepath.WalkDir(filepath.Join(dir, "blobs"), func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			b := harness.Read(t, path)
			all.WriteString(b)
			if z, err := gzip.NewReader(strings.NewReader(b)); err == nil {
				if _, err := io.Copy(&all, z); err != nil {
					t.Error(err)
				}
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all.String()
}

// TestSkopeoBuildahPodmanEncryptAndDecrypt has skopeo, buildah and podman encrypt and decrypt with pilot as a
// daemon and as an executable, and ctr-pilot read what they wrote.
func TestSkopeoBuildahPodmanEncryptAndDecrypt(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	_, brokerURL := harness.StartBroker(t, dir+"/broker", "team-a")
	_, daemon := harness.StartPilot(t, dir+"/ci", brokerURL)
	executable := harness.Write(t, dir+"/executable.conf", fmt.Sprintf(
		`{"key-providers": {"pilot": {"cmd": {"path": "%s/pilot", "args": ["keyprovider", "--broker", "%s"]}}}}`, harness.Bin, brokerURL))
	forwarding := harness.Write(t, dir+"/forwarding.conf", fmt.Sprintf(
		`{"key-providers": {"pilot": {"cmd": {"path": "%s/pilot", "args": ["keyprovider", "--daemon", "unix://%s/ci/keyprovider.sock"]}}}}`, harness.Bin, dir))
	c := harness.NewCI(t, dir+"/ci", daemon)
	d := harness.NewDebian(t, dir, daemon)
	secret := harness.NewSecret()
	l := harness.NewLayout(t)
	l.Write(dir+"/plain", "v1", l.Image(harness.LayerKinds[0], false, harness.Arch, secret))

	for name, conf := range map[string]string{"daemon": daemon, "executable": executable, "forwarding": forwarding} {
		t.Run("skopeo/"+name, func(t *testing.T) {
			d := &harness.Debian{T: t, Root: d.Root, Ocicrypt: conf}
			encrypted, decrypted := "oci:"+dir+"/"+name+"-encrypted:v1", "oci:"+dir+"/"+name+"-decrypted:v1"
			harness.Output(t, d.Run("skopeo", "copy", "--encryption-key", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", encrypted))
			if strings.Contains(blobs(t, dir+"/"+name+"-encrypted"), secret) {
				t.Error("the secret is in what skopeo wrote")
			}
			harness.Output(t, d.Run("skopeo", "copy", "--decryption-key", "provider:pilot:team-a", encrypted, decrypted))
			if !strings.Contains(blobs(t, dir+"/"+name+"-decrypted"), secret) {
				t.Error("the secret is not in what skopeo decrypted")
			}
			harness.ExpectFailure(t, d.Run("skopeo", "copy", "--decryption-key", "provider:pilot:team-b", encrypted, decrypted+"x"), `wrapped with KEK "team-a"`)
			harness.ExpectFailure(t, d.Run("skopeo", "copy", "--encryption-key", "provider:pilot:nobody", "oci:"+dir+"/plain:v1", encrypted+"x"), `KEK "nobody"`, "no such KEK")
		})
	}

	// skopeo compresses on the way to the registry, before it encrypts.
	byLayerTool := c.Registry + "/skopeo:v1"
	harness.Output(t, d.Run("skopeo", "copy", "--dest-tls-verify=false", "--dest-compress", "--encryption-key", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", "docker://"+byLayerTool))
	harness.Output(t, c.CtrPilot("images", "pull", "--plain-http", byLayerTool))
	if out := harness.ContainerOutput(t, c.CtrPilot("run", "--rm", byLayerTool, harness.ContainerID())); !strings.Contains(out, secret) {
		t.Errorf("run of what skopeo encrypted: %s", out)
	}
	harness.Output(t, c.CtrPilot("images", "decrypt", byLayerTool, byLayerTool+"-plain"))
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", byLayerTool+"-plain"))
	harness.Output(t, d.Run("skopeo", "copy", "--src-tls-verify=false", "docker://"+byLayerTool+"-plain", "oci:"+dir+"/by-ctr-pilot:v1"))

	// What ctr-pilot wrote, from an OCI and from a Docker image.
	for _, k := range harness.LayerKinds {
		ours := c.Image(k, "provider:pilot:team-a")
		harness.Output(t, d.Run("skopeo", "copy", "--src-tls-verify=false", "--decryption-key", "provider:pilot:team-a", "docker://"+ours, "oci:"+dir+"/from-us-"+k.Name+":v1"))
		if k.Name == "tar" && !strings.Contains(blobs(t, dir+"/from-us-tar"), c.Secrets[ours]) {
			t.Error("skopeo does not find the secret in what ctr-pilot encrypted")
		}
	}
	docker := c.Registry + "/docker:v1"
	dl := harness.NewLayout(t)
	harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", dl.Tar(dir+"/docker.tar", docker+"-plain", dl.Image(harness.LayerKinds[1], true, harness.Arch, secret))))
	harness.Output(t, c.CtrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", docker+"-plain", docker))
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", docker))
	harness.Output(t, d.Run("skopeo", "copy", "--src-tls-verify=false", "--decryption-key", "provider:pilot:team-a", "docker://"+docker, "oci:"+dir+"/from-docker:v1"))

	t.Run("buildah", func(t *testing.T) {
		d := &harness.Debian{T: t, Root: d.Root, Ocicrypt: daemon}
		image := c.Registry + "/buildah:v1"
		id := strings.TrimSpace(harness.Output(t, d.Run("buildah", "pull", "-q", "oci:"+dir+"/plain:v1")))
		harness.Output(t, d.Run("buildah", "push", "-q", "--tls-verify=false", "--encryption-key", "provider:pilot:team-a", id, "docker://"+image))
		harness.Output(t, c.CtrPilot("images", "pull", "--plain-http", image))
		if out := harness.ContainerOutput(t, c.CtrPilot("run", "--rm", image, harness.ContainerID())); !strings.Contains(out, secret) {
			t.Errorf("run of what buildah encrypted: %s", out)
		}
		harness.Output(t, d.Run("buildah", "rmi", "-f", id))
		harness.Output(t, d.Run("buildah", "pull", "-q", "--tls-verify=false", "--decryption-key", "provider:pilot:team-a", "docker://"+image))
	})
	t.Run("podman", func(t *testing.T) {
		d := &harness.Debian{T: t, Root: d.Root, Ocicrypt: executable}
		ours := c.Image(harness.LayerKinds[1], "provider:pilot:team-a")
		harness.Output(t, d.Run("podman", "pull", "-q", "--tls-verify=false", "--decryption-key", "provider:pilot:team-a", ours))
		image := c.Registry + "/podman:v1"
		harness.Output(t, d.Run("podman", "push", "-q", "--tls-verify=false", "--encryption-key", "provider:pilot:team-a", ours, image))
		harness.Output(t, c.CtrPilot("images", "pull", "--plain-http", image))
		if out := harness.ContainerOutput(t, c.CtrPilot("run", "--rm", image, harness.ContainerID())); !strings.Contains(out, c.Secrets[ours]) {
			t.Errorf("run of what podman encrypted: %s", out)
		}
	})
}

// TestPilotReplacesTheOriginal runs pilot in the original's place, between skopeo and a
// broker with the original's API.
func TestPilotReplacesTheOriginal(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.Original)
	dir := harness.TempDir(t)
	var ports [2]string
	for i := range ports {
		_, ports[i], _ = net.SplitHostPort(loopbacktest.FreeAddress(t))
	}
	harness.Write(t, dir+"/key", strings.Repeat("k", 32))
	harness.Output(t, harness.Command(t, "copilot", "keys", "import", "--dir", dir+"/broker", "--file", dir+"/key", "team-a"))
	harness.Start(t, dir, "copilot", exec.Command("copilot", "serve", "--dir", dir+"/broker", "--insecure-loopback", "--listen", "127.0.0.1:"+ports[0]))
	serve := exec.Command("pilot", "serve", "--original-defaults", "--default-keks", "team-b,team-a")
	serve.Env = append(os.Environ(), "GRPC_PORT="+ports[1], "KEYREQUEST_BASEURL=http://localhost:"+ports[0]+"/api/v1/key",
		"KEYREQUEST_CACHE_TIMEOUT=1", "KEYREQUEST_CACHE_UNITS=MINUTES")
	harness.Start(t, dir, "pilot", serve)
	for _, port := range ports {
		harness.Await(t, "port "+port, harness.Listening("127.0.0.1:"+port))
	}
	d := harness.NewDebian(t, dir, harness.Write(t, dir+"/ocicrypt.conf", `{"key-providers": {"pilot": {"grpc": "127.0.0.1:`+ports[1]+`"}}}`))
	secret := harness.NewSecret()
	l := harness.NewLayout(t)
	l.Write(dir+"/plain", "v1", l.Image(harness.LayerKinds[0], false, harness.Arch, secret))
	harness.Output(t, d.Run("skopeo", "copy", "--encryption-key", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", "oci:"+dir+"/encrypted:v1"))
	for name, key := range map[string]string{"named": "provider:pilot:team-a", "default": "provider:pilot"} {
		harness.Output(t, d.Run("skopeo", "copy", "--decryption-key", key, "oci:"+dir+"/encrypted:v1", "oci:"+dir+"/"+name+":v1"))
		if !strings.Contains(blobs(t, dir+"/"+name), secret) {
			t.Errorf("%s: the secret is not there", name)
		}
	}
}

package integration

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
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// debian is a root of Debian 13, with skopeo, buildah and podman that know the
// key provider protocol. Commands in it see dir at its own path.
type debian struct {
	t        testing.TB
	root     string
	ocicrypt string
}

func newDebian(t testing.TB, dir, ocicrypt string) *debian {
	t.Helper()
	m := newMachine(t, filepath.Join(tools, "trixie"))
	m.mount(dir, dir, "", syscall.MS_BIND, "")
	m.mount(bin, bin, "", syscall.MS_BIND, "")
	root := m.root
	write(t, filepath.Join(root, "etc/containers/policy.json"), `{"default": [{"type": "insecureAcceptAnything"}]}`)
	write(t, filepath.Join(root, "etc/containers/storage.conf"), "[storage]\ndriver = \"vfs\"\nrunroot = \"/run/containers\"\ngraphroot = \"/var/lib/containers\"\n")
	return &debian{t, root, ocicrypt}
}

func (d *debian) run(name string, args ...string) *exec.Cmd {
	d.t.Helper()
	cmd := command(d.t, "chroot", append([]string{d.root, name}, args...)...)
	cmd.Env = []string{"PATH=" + bin + ":/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "OCICRYPT_KEYPROVIDER_CONFIG=" + d.ocicrypt}
	return cmd
}

// write writes an image as an OCI layout.
func (l *layout) write(dir, tag string, target object) {
	target["annotations"] = object{"org.opencontainers.image.ref.name": tag}
	target = object{"schemaVersion": 2, "manifests": []object{target}}
	for name, b := range l.files {
		write(l.t, filepath.Join(dir, name), string(b))
	}
	l.json("", target)
	for _, b := range l.files {
		if strings.Contains(string(b), `"org.opencontainers.image.ref.name"`) {
			write(l.t, filepath.Join(dir, "index.json"), string(b))
		}
	}
}

// blobs returns the blobs of a layout, uncompressed, as one string.
func blobs(t testing.TB, dir string) string {
	t.Helper()
	var all strings.Builder
	err := filepath.WalkDir(filepath.Join(dir, "blobs"), func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			b := read(t, path)
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

// TestTools has skopeo, buildah and podman encrypt and decrypt with pilot as a
// daemon and as an executable, and ctr-pilot read what they wrote.
func TestTools(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	_, daemon := pilot(t, dir+"/ci", brokerURL)
	executable := write(t, dir+"/executable.conf", fmt.Sprintf(
		`{"key-providers": {"pilot": {"cmd": {"path": "%s/pilot", "args": ["keyprovider", "--broker", "%s"]}}}}`, bin, brokerURL))
	forwarding := write(t, dir+"/forwarding.conf", fmt.Sprintf(
		`{"key-providers": {"pilot": {"cmd": {"path": "%s/pilot", "args": ["keyprovider", "--daemon", "unix://%s/ci/keyprovider.sock"]}}}}`, bin, dir))
	c := newCI(t, dir+"/ci", daemon)
	d := newDebian(t, dir, daemon)
	secret := newSecret()
	l := newLayout(t)
	l.write(dir+"/plain", "v1", l.image(kinds[0], false, goarch, secret))

	for name, conf := range map[string]string{"daemon": daemon, "executable": executable, "forwarding": forwarding} {
		t.Run("skopeo/"+name, func(t *testing.T) {
			d := &debian{t, d.root, conf}
			encrypted, decrypted := "oci:"+dir+"/"+name+"-encrypted:v1", "oci:"+dir+"/"+name+"-decrypted:v1"
			output(t, d.run("skopeo", "copy", "--encryption-key", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", encrypted))
			if strings.Contains(blobs(t, dir+"/"+name+"-encrypted"), secret) {
				t.Error("the secret is in what skopeo wrote")
			}
			output(t, d.run("skopeo", "copy", "--decryption-key", "provider:pilot:team-a", encrypted, decrypted))
			if !strings.Contains(blobs(t, dir+"/"+name+"-decrypted"), secret) {
				t.Error("the secret is not in what skopeo decrypted")
			}
			fails(t, d.run("skopeo", "copy", "--decryption-key", "provider:pilot:team-b", encrypted, decrypted+"x"), `wrapped with KEK "team-a"`)
			fails(t, d.run("skopeo", "copy", "--encryption-key", "provider:pilot:nobody", "oci:"+dir+"/plain:v1", encrypted+"x"), `KEK "nobody"`, "no such KEK")
		})
	}

	// skopeo compresses on the way to the registry, before it encrypts.
	byLayerTool := c.registry + "/skopeo:v1"
	output(t, d.run("skopeo", "copy", "--dest-tls-verify=false", "--dest-compress", "--encryption-key", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", "docker://"+byLayerTool))
	output(t, c.ctrPilot("images", "pull", "--plain-http", byLayerTool))
	if out := containerOutput(t, c.ctrPilot("run", "--rm", byLayerTool, containerID())); !strings.Contains(out, secret) {
		t.Errorf("run of what skopeo encrypted: %s", out)
	}
	output(t, c.ctrPilot("images", "decrypt", byLayerTool, byLayerTool+"-plain"))
	output(t, c.ctrPilot("images", "push", "--plain-http", byLayerTool+"-plain"))
	output(t, d.run("skopeo", "copy", "--src-tls-verify=false", "docker://"+byLayerTool+"-plain", "oci:"+dir+"/by-ctr-pilot:v1"))

	// What ctr-pilot wrote, from an OCI and from a Docker image.
	for _, k := range kinds {
		ours := c.image(k, "provider:pilot:team-a")
		output(t, d.run("skopeo", "copy", "--src-tls-verify=false", "--decryption-key", "provider:pilot:team-a", "docker://"+ours, "oci:"+dir+"/from-us-"+k.name+":v1"))
		if k.name == "tar" && !strings.Contains(blobs(t, dir+"/from-us-tar"), c.secrets[ours]) {
			t.Error("skopeo does not find the secret in what ctr-pilot encrypted")
		}
	}
	docker := c.registry + "/docker:v1"
	dl := newLayout(t)
	output(t, c.ctrPilot("images", "import", "--no-unpack", dl.tar(dir+"/docker.tar", docker+"-plain", dl.image(kinds[1], true, goarch, secret))))
	output(t, c.ctrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", docker+"-plain", docker))
	output(t, c.ctrPilot("images", "push", "--plain-http", docker))
	output(t, d.run("skopeo", "copy", "--src-tls-verify=false", "--decryption-key", "provider:pilot:team-a", "docker://"+docker, "oci:"+dir+"/from-docker:v1"))

	t.Run("buildah", func(t *testing.T) {
		d := &debian{t, d.root, daemon}
		image := c.registry + "/buildah:v1"
		id := strings.TrimSpace(output(t, d.run("buildah", "pull", "-q", "oci:"+dir+"/plain:v1")))
		output(t, d.run("buildah", "push", "-q", "--tls-verify=false", "--encryption-key", "provider:pilot:team-a", id, "docker://"+image))
		output(t, c.ctrPilot("images", "pull", "--plain-http", image))
		if out := containerOutput(t, c.ctrPilot("run", "--rm", image, containerID())); !strings.Contains(out, secret) {
			t.Errorf("run of what buildah encrypted: %s", out)
		}
		output(t, d.run("buildah", "rmi", "-f", id))
		output(t, d.run("buildah", "pull", "-q", "--tls-verify=false", "--decryption-key", "provider:pilot:team-a", "docker://"+image))
	})
	t.Run("podman", func(t *testing.T) {
		d := &debian{t, d.root, executable}
		ours := c.image(kinds[1], "provider:pilot:team-a")
		output(t, d.run("podman", "pull", "-q", "--tls-verify=false", "--decryption-key", "provider:pilot:team-a", ours))
		image := c.registry + "/podman:v1"
		output(t, d.run("podman", "push", "-q", "--tls-verify=false", "--encryption-key", "provider:pilot:team-a", ours, image))
		output(t, c.ctrPilot("images", "pull", "--plain-http", image))
		if out := containerOutput(t, c.ctrPilot("run", "--rm", image, containerID())); !strings.Contains(out, c.secrets[ours]) {
			t.Errorf("run of what podman encrypted: %s", out)
		}
	})
}

// TestOriginalDropIn runs pilot in the original's place, between skopeo and a
// broker with the original's API.
func TestOriginalDropIn(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	var ports [2]string
	for i := range ports {
		_, ports[i], _ = net.SplitHostPort(loopbacktest.FreeAddress(t))
	}
	write(t, dir+"/key", strings.Repeat("k", 32))
	output(t, command(t, "copilot", "keys", "import", "--dir", dir+"/broker", "--file", dir+"/key", "team-a"))
	start(t, dir, "copilot", exec.Command("copilot", "serve", "--dir", dir+"/broker", "--insecure-loopback", "--listen", "127.0.0.1:"+ports[0]))
	serve := exec.Command("pilot", "serve", "--original-defaults", "--default-keks", "team-b,team-a")
	serve.Env = append(os.Environ(), "GRPC_PORT="+ports[1], "KEYREQUEST_BASEURL=http://localhost:"+ports[0]+"/api/v1/key",
		"KEYREQUEST_CACHE_TIMEOUT=1", "KEYREQUEST_CACHE_UNITS=MINUTES")
	start(t, dir, "pilot", serve)
	for _, port := range ports {
		await(t, "port "+port, func() error {
			conn, err := net.Dial("tcp", "127.0.0.1:"+port)
			if err == nil {
				conn.Close()
			}
			return err
		})
	}
	d := newDebian(t, dir, write(t, dir+"/ocicrypt.conf", `{"key-providers": {"pilot": {"grpc": "127.0.0.1:`+ports[1]+`"}}}`))
	secret := newSecret()
	l := newLayout(t)
	l.write(dir+"/plain", "v1", l.image(kinds[0], false, goarch, secret))
	output(t, d.run("skopeo", "copy", "--encryption-key", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", "oci:"+dir+"/encrypted:v1"))
	for name, key := range map[string]string{"named": "provider:pilot:team-a", "default": "provider:pilot"} {
		output(t, d.run("skopeo", "copy", "--decryption-key", key, "oci:"+dir+"/encrypted:v1", "oci:"+dir+"/"+name+":v1"))
		if !strings.Contains(blobs(t, dir+"/"+name), secret) {
			t.Errorf("%s: the secret is not there", name)
		}
	}
}

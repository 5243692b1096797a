package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// builtinNode builds a containerd with pilot's differ in it, and starts a node with
// it, whose directory of keys is keys in its own.
func builtinNode(t testing.TB, dir, ociConf string) *node {
	t.Helper()
	build := exec.Command("go", "build", "-buildvcs=false", "-o", filepath.Join(dir, "bin", "containerd"), ".")
	build.Dir = filepath.Join(repo, "integration/testdata/containerd")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", build.Args, err, out)
	}
	if err := os.Symlink(filepath.Join(tools, "bin/containerd-shim-runc-v2"), filepath.Join(dir, "bin/containerd-shim-runc-v2")); err != nil {
		t.Fatal(err)
	}
	home := tempDir(t)
	v := containerd2()
	v.name, v.command = "2.4.2 with pilot", []string{filepath.Join(dir, "bin/containerd")}
	return startNode(t, home, v, "", fmt.Sprintf(`
[plugins.'io.containerd.differ.v1.pilot']
  key_providers = '%s'
  decryption_keys_path = '%s/keys'
  layers_at_once = 2
[plugins.'io.containerd.service.v1.diff-service']
  default = ['pilot']
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = 'linux/%s'
  snapshotter = 'overlayfs'
  differ = 'pilot'
# What is left of an earlier set-up does no harm.
[stream_processors.'io.containerd.ocicrypt.decoder.v1.tar.gzip']
  accepts = ['application/vnd.oci.image.layer.v1.tar+gzip+encrypted']
  returns = 'application/vnd.oci.image.layer.v1.tar+gzip'
  path = '/bin/false'
`, ociConf, home, goarch))
}

// TestBuiltin pulls with a containerd that has pilot's differ in it.
func TestBuiltin(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newCI(t, dir+"/ci", ociConf)
	n := builtinNode(t, dir, ociConf)
	for _, k := range kinds {
		image := c.image(k, "provider:pilot:team-a")
		output(t, n.crictl("pull", image))
		output(t, n.crictl("rmi", image))
		for _, args := range [][]string{{"--local"}, {}} {
			output(t, n.ctr(append([]string{"images", "pull", "--plain-http", image}, args...)...))
			if out := containerOutput(t, n.ctr("run", "--rm", image, containerID())); !strings.Contains(out, c.secrets[image]) {
				t.Errorf("%s: %s", k.name, out)
			}
			output(t, n.ctr("images", "remove", "--sync", image))
		}
		fails(t, n.crictl("pull", c.tamper(image, func(b []byte) []byte { b[len(b)/2] ^= 1; return b })), "pilot: layer sha256:", "HMAC does not match")
	}
	image := c.image(kinds[1], "provider:pilot:team-a")
	output(t, n.ctr("images", "pull", "--plain-http", image))
	output(t, n.ctr("containers", "create", image, "c"))
	n.commitKeepsLease(t, "c")

	private, public := keyPair(t, dir+"/pair")
	forKey := c.image(kinds[1], "jwe:"+public)
	fails(t, n.crictl("pull", forKey), "jwe: no private key was given", n.dir+`/keys" is missing`)
	write(t, n.dir+"/keys/README", "The keys of this node.\n")
	write(t, n.dir+"/keys/key.pem", read(t, private))
	output(t, n.crictl("pull", forKey))
}

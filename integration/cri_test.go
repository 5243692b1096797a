package integration

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// ci is a machine that encrypts images and pushes them to a registry.
type ci struct {
	*node
	registry, storage string
	secrets           map[string]string // by image
}

func newCI(t testing.TB, dir, ocicrypt string) *ci {
	t.Helper()
	c := &ci{node: newNode(t, dir, containerd2(), ocicrypt, ""), secrets: map[string]string{}}
	c.registry, c.storage = registry(t, dir)
	return c
}

// image makes an encrypted image and returns its name in the registry.
func (c *ci) image(k kind, recipients ...string) string {
	c.t.Helper()
	secret := newSecret()
	name := fmt.Sprintf("%s/image%d:%s", c.registry, len(c.secrets), k.name)
	l := newLayout(c.t)
	c.publish(l, name, l.image(k, false, goarch, secret), recipients...)
	c.secrets[name] = secret
	return name
}

// publish imports an image of a layout, with -plain after its name, encrypts it
// and pushes the outcome.
func (c *ci) publish(l *layout, name string, image object, recipients ...string) {
	c.t.Helper()
	output(c.t, c.ctrPilot("images", "import", "--no-unpack", "--all-platforms", l.tar(c.dir+"/image.tar", name+"-plain", image)))
	args := []string{"images", "encrypt"}
	for _, r := range recipients {
		args = append(args, "--recipient", r)
	}
	output(c.t, c.ctrPilot(append(args, name+"-plain", name)...))
	output(c.t, c.ctrPilot("images", "push", "--plain-http", name))
}

// blob returns the registry's file of a blob.
func (c *ci) blob(digest string) string {
	hex := strings.TrimPrefix(digest, "sha256:")
	return filepath.Join(c.storage, "docker/registry/v2/blobs/sha256", hex[:2], hex, "data")
}

// tamper changes the last layer of an image in the registry, and all digests
// up to the tag so that the registry and containerd find nothing wrong. It
// returns the name of the changed image.
func (c *ci) tamper(name string, change func([]byte) []byte) string {
	c.t.Helper()
	repository, tag, _ := strings.Cut(strings.TrimPrefix(name, c.registry+"/"), ":")
	root := filepath.Join(c.storage, "docker/registry/v2/repositories", repository)
	put := func(b []byte, link string) string {
		sum := sha256.Sum256(b)
		digest := hex.EncodeToString(sum[:])
		write(c.t, c.blob("sha256:"+digest), string(b))
		write(c.t, filepath.Join(root, link, "sha256", digest, "link"), "sha256:"+digest)
		return "sha256:" + digest
	}
	manifest := read(c.t, c.blob(read(c.t, filepath.Join(root, "_manifests/tags", tag, "current/link"))))
	var m struct {
		Layers []struct {
			Digest string
			Size   int
		}
	}
	if err := json.Unmarshal([]byte(manifest), &m); err != nil {
		c.t.Fatal(err)
	}
	last := m.Layers[len(m.Layers)-1]
	layer := change([]byte(read(c.t, c.blob(last.Digest))))
	manifest = strings.Replace(manifest, last.Digest, put(layer, "_layers"), 1)
	manifest = strings.Replace(manifest, fmt.Sprintf(`"size": %d`, last.Size), fmt.Sprintf(`"size": %d`, len(layer)), -1)
	digest := put([]byte(manifest), "_manifests/revisions")
	write(c.t, filepath.Join(root, "_manifests/tags", tag+"-tampered", "current/link"), digest)
	write(c.t, filepath.Join(root, "_manifests/tags", tag+"-tampered", "index", "sha256", strings.TrimPrefix(digest, "sha256:"), "link"), digest)
	return name + "-tampered"
}

// TestCRI pulls as the kubelet does, with the keys of the node.
func TestCRI(t *testing.T) {
	dir := tempDir(t)
	brokerProcess, brokerURL := broker(t, dir+"/broker", "team-a")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	private, public := keyPair(t, dir+"/keys")
	c := newCI(t, dir+"/ci", ociConf)
	forNode := map[string]string{}
	for _, k := range kinds {
		forNode[k.name] = c.image(k, "provider:pilot:team-a")
	}
	forKey := c.image(kinds[1], "jwe:"+public)
	flipped := c.tamper(forNode["gzip"], func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
	cut := c.tamper(forNode["tar"], func(b []byte) []byte { return b[:len(b)-512] })
	// Nobody answers here.
	silent, err := net.Listen("unix", filepath.Join(dir, "silent.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()

	all := t
	for _, v := range []version{containerd2(), containerd16()} {
		t.Run(v.name, func(t *testing.T) {
			home := tempDir(t)
			_, conf := pilot(t, home, brokerURL, "--kek-cache-size", "0")
			n := newNode(t, home, v, conf, filepath.Dir(private))
			n.t = t
			for name, image := range forNode {
				output(t, n.crictl("pull", image))
				if out := output(t, n.ctrPilot("--namespace", "k8s.io", "run", "--rm", image, "cri-"+name)); !strings.Contains(out, c.secrets[image]) {
					t.Errorf("%s: %s", name, out)
				}
				output(t, n.crictl("rmi", image))
			}
			output(t, n.crictl("pull", forKey))
			output(t, n.crictl("rmi", forKey))

			for _, tampered := range []string{flipped, cut} {
				// containerd 1.6 may find the snapshot of a layer that the image
				// before had, and collect it before it builds on it.
				n.collect(t)
				fails(t, n.crictl("pull", tampered), "layer sha256:", "HMAC does not match")
			}
			if out := output(t, n.crictl("images")); strings.Contains(out, "tampered") {
				t.Errorf("a tampered image is there:\n%s", out)
			}

			// A client that passes no payload, as containerd's own pull does.
			fails(t, n.ctr("images", "pull", "--local", "--plain-http", forNode["tar"]),
				"pilot-decoder: containerd passed no decryption payload")

			brokerProcess.stop(t)
			fails(t, n.crictl("pull", forNode["tar"]), "layer sha256:", `KEK "team-a"`, "copilot at "+brokerURL)
			os.Rename(conf, conf+".away")
			fails(t, n.crictl("pull", forNode["tar"]), `key provider "pilot" is not configured`)
			write(t, conf, `{"key-providers": {"pilot": {"grpc": "unix://`+home+`/nobody.sock"}}}`)
			fails(t, n.crictl("pull", forNode["tar"]), "layer sha256:", home+"/nobody.sock")
			brokerProcess, _ = broker(all, dir+"/broker")
		})
	}
}

// TestDecoderErrorsReachTheUser pulls an image without its KEK again and again,
// since containerd may look for the decoder's error before it is there.
func TestDecoderErrorsReachTheUser(t *testing.T) {
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	_, otherURL := broker(t, dir+"/other")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newCI(t, dir+"/ci", ociConf)
	image := c.image(kinds[1], "provider:pilot:team-a")
	_, conf := pilot(t, dir+"/node", otherURL)
	for _, v := range []version{containerd2(), containerd16()} {
		n := newNode(t, filepath.Join(dir, v.name), v, conf, "")
		for range 15 {
			fails(t, n.crictl("pull", image), "pilot-decoder: layer sha256:", `KEK "team-a"`, "no such KEK")
			if t.Failed() {
				break
			}
		}
		if out := output(t, n.ctrPilot("--namespace", "k8s.io", "snapshots", "list")); strings.Contains(out, "sha256:") {
			t.Errorf("containerd %s has snapshots:\n%s", v.name, out)
		}
	}
}

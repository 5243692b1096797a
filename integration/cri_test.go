package integration

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ci is a machine that encrypts images and pushes them to a registry.
type ci struct {
	*node
	registry, storage string
	secrets           map[string]string // by image
	tampered          int               // images
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
	c.tampered++
	return c.edit(name, fmt.Sprintf("tampered%d", c.tampered), func(m *ocispec.Manifest) {
		last := &m.Layers[len(m.Layers)-1]
		layer := change([]byte(read(c.t, c.blob(last.Digest.String()))))
		last.Digest, last.Size = c.put(name, "_layers", layer), int64(len(layer))
	})
}

// edit changes the manifest of an image in the registry, and returns the name
// under which it is, with suffix after its tag.
func (c *ci) edit(name, suffix string, change func(m *ocispec.Manifest)) string {
	c.t.Helper()
	tags := filepath.Join(c.repository(name), "_manifests/tags")
	_, tag, _ := strings.Cut(strings.TrimPrefix(name, c.registry+"/"), ":")
	var m ocispec.Manifest
	if err := json.Unmarshal([]byte(read(c.t, c.blob(read(c.t, filepath.Join(tags, tag, "current/link"))))), &m); err != nil {
		c.t.Fatal(err)
	}
	change(&m)
	b, err := json.Marshal(m)
	if err != nil {
		c.t.Fatal(err)
	}
	d := c.put(name, "_manifests/revisions", b)
	tag += "-" + suffix
	write(c.t, filepath.Join(tags, tag, "current/link"), d.String())
	write(c.t, filepath.Join(tags, tag, "index/sha256", d.Encoded(), "link"), d.String())
	return name + "-" + suffix
}

// repository returns the registry's directory for the repository of an image.
func (c *ci) repository(name string) string {
	repository, _, _ := strings.Cut(strings.TrimPrefix(name, c.registry+"/"), ":")
	return filepath.Join(c.storage, "docker/registry/v2/repositories", repository)
}

// put writes a blob into the registry's storage, as a layer or a manifest of an
// image's repository.
func (c *ci) put(name, kind string, b []byte) digest.Digest {
	c.t.Helper()
	d := digest.FromBytes(b)
	write(c.t, c.blob(d.String()), string(b))
	write(c.t, filepath.Join(c.repository(name), kind, "sha256", d.Encoded(), "link"), d.String())
	return d
}

// TestCRI pulls as the kubelet does, with the keys of the node.
func TestCRI(t *testing.T) {
	t.Parallel()
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
				if out := containerOutput(t, n.ctrPilot("--namespace", "k8s.io", "run", "--rm", image, containerID())); !strings.Contains(out, c.secrets[image]) {
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
	t.Parallel()
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

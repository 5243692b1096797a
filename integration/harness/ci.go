package harness

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// CI is a machine that encrypts images and pushes them to a registry.
type CI struct {
	*Node
	Registry, Storage string
	Secrets           map[string]string // by image
	tampered          int               // images

	// Of StartCI.
	Broker    *Process
	BrokerURL string
}

// StartCI starts a broker with KEKs in dir/broker and, in dir/ci, a pilot and the machine.
func StartCI(t testing.TB, dir string, keks ...string) *CI {
	t.Helper()
	broker, url := StartBroker(t, dir+"/broker", keks...)
	_, ocicrypt := StartPilot(t, dir+"/ci", url)
	c := NewCI(t, dir+"/ci", ocicrypt)
	c.Broker, c.BrokerURL = broker, url
	return c
}

// NewCI starts a machine whose key providers are those of the file ocicrypt.
func NewCI(t testing.TB, dir, ocicrypt string) *CI {
	t.Helper()
	c := &CI{Node: NewNode(t, dir, Containerd2(), ocicrypt, ""), Secrets: map[string]string{}}
	c.Registry, c.Storage = StartRegistry(t, dir)
	return c
}

// Image makes an encrypted image and returns its name in the registry.
func (c *CI) Image(k LayerKind, recipients ...string) string {
	c.T.Helper()
	secret := NewSecret()
	name := fmt.Sprintf("%s/image%d:%s", c.Registry, len(c.Secrets), k.Name)
	l := NewLayout(c.T)
	c.Publish(l, name, l.Image(k, false, Arch, secret), recipients...)
	c.Secrets[name] = secret
	return name
}

// Publish imports an image of a layout, with -plain after its name, encrypts it
// and pushes the outcome.
func (c *CI) Publish(l *Layout, name string, image Object, recipients ...string) {
	c.T.Helper()
	Output(c.T, c.CtrPilot("images", "import", "--no-unpack", "--all-platforms", l.Tar(c.Dir+"/image.tar", name+"-plain", image)))
	args := []string{"images", "encrypt"}
	for _, r := range recipients {
		args = append(args, "--recipient", r)
	}
	Output(c.T, c.CtrPilot(append(args, name+"-plain", name)...))
	Output(c.T, c.CtrPilot("images", "push", "--plain-http", name))
}

// Blob returns the registry's file of a blob.
func (c *CI) Blob(digest string) string {
	hex := strings.TrimPrefix(digest, "sha256:")
	return filepath.Join(c.Storage, "docker/registry/v2/blobs/sha256", hex[:2], hex, "data")
}

// Tamper changes the last layer of an image in the registry, and all digests
// up to the tag so that the registry and containerd find nothing wrong. It
// returns the name of the changed image.
func (c *CI) Tamper(name string, change func([]byte) []byte) string {
	c.T.Helper()
	c.tampered++
	return c.Edit(name, fmt.Sprintf("tampered%d", c.tampered), func(m *ocispec.Manifest) {
		last := &m.Layers[len(m.Layers)-1]
		layer := change([]byte(Read(c.T, c.Blob(last.Digest.String()))))
		last.Digest, last.Size = c.Put(name, "_layers", layer), int64(len(layer))
	})
}

// Edit changes the manifest of an image in the registry, and returns the name
// under which it is, with suffix after its tag.
func (c *CI) Edit(name, suffix string, change func(m *ocispec.Manifest)) string {
	c.T.Helper()
	tags := filepath.Join(c.Repository(name), "_manifests/tags")
	_, tag, _ := strings.Cut(strings.TrimPrefix(name, c.Registry+"/"), ":")
	var m ocispec.Manifest
	if err := json.Unmarshal([]byte(Read(c.T, c.Blob(c.Digest(name).String()))), &m); err != nil {
		c.T.Fatal(err)
	}
	change(&m)
	b, err := json.Marshal(m)
	if err != nil {
		c.T.Fatal(err)
	}
	d := c.Put(name, "_manifests/revisions", b)
	tag += "-" + suffix
	Write(c.T, filepath.Join(tags, tag, "current/link"), d.String())
	Write(c.T, filepath.Join(tags, tag, "index/sha256", d.Encoded(), "link"), d.String())
	return name + "-" + suffix
}

// Repository returns the registry's directory for the repository of an image.
func (c *CI) Repository(name string) string {
	repository, _, _ := strings.Cut(strings.TrimPrefix(name, c.Registry+"/"), ":")
	return filepath.Join(c.Storage, "docker/registry/v2/repositories", repository)
}

// Digest returns that of the manifest or index of an image in the registry.
func (c *CI) Digest(name string) digest.Digest {
	c.T.Helper()
	_, tag, _ := strings.Cut(strings.TrimPrefix(name, c.Registry+"/"), ":")
	return digest.Digest(Read(c.T, filepath.Join(c.Repository(name), "_manifests/tags", tag, "current/link")))
}

// Put writes a blob into the registry's storage, as a layer or a manifest of an
// image's repository.
func (c *CI) Put(name, kind string, b []byte) digest.Digest {
	c.T.Helper()
	d := digest.FromBytes(b)
	Write(c.T, c.Blob(d.String()), string(b))
	Write(c.T, filepath.Join(c.Repository(name), kind, "sha256", d.Encoded(), "link"), d.String())
	return d
}

// Pause puts the image of pods' sandboxes into the registry and returns its
// name.
func (c *CI) Pause() string {
	c.T.Helper()
	name := c.Registry + "/pause:1"
	l := NewLayout(c.T)
	image := l.Image(LayerKinds[0], false, Arch, "")
	manifest := string(l.Files["blobs/sha256/"+strings.TrimPrefix(image["digest"].(string), "sha256:")])
	_, rest, _ := strings.Cut(manifest, `"config": `)
	var config struct{ Digest string }
	if err := json.NewDecoder(strings.NewReader(rest)).Decode(&config); err != nil {
		c.T.Fatal(err)
	}
	doc := strings.Replace(string(l.Files["blobs/sha256/"+strings.TrimPrefix(config.Digest, "sha256:")]), `"/hello"`, `"/hello","pause"`, 1)
	newConfig := l.Blob("application/vnd.oci.image.config.v1+json", []byte(doc))
	manifest = strings.Replace(manifest, config.Digest, newConfig["digest"].(string), 1)
	manifest = strings.Replace(manifest, fmt.Sprintf(`"size": %d`, len(doc)-len(`,"pause"`)), fmt.Sprintf(`"size": %d`, len(doc)), 1)
	Output(c.T, c.CtrPilot("images", "import", "--no-unpack", l.Tar(c.Dir+"/image.tar", name, l.Blob(image["mediaType"].(string), []byte(manifest)))))
	Output(c.T, c.CtrPilot("images", "push", "--plain-http", name))
	return name
}

// BigLayer is the size of a layer of the big image, in bytes.
const BigLayer = 32 << 20

// BigImage makes an encrypted image of four such layers.
func (c *CI) BigImage(recipient string) string {
	c.T.Helper()
	name := c.Registry + "/big:1"
	l := NewLayout(c.T)
	var layers []Object
	var ids []string
	for i := range 4 {
		content := make([]byte, BigLayer)
		for j := range content {
			content[j] = byte(i + j + j>>8 + j>>16)
		}
		layer, id := l.Layer(LayerKinds[0], LayerKinds[0].OCI, map[string][]byte{fmt.Sprintf("file%d", i): content})
		layers, ids = append(layers, layer), append(ids, id)
	}
	c.Publish(l, name, l.Manifest(layers, ids), recipient)
	return name
}

package pull

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// containerd22 is the version between the two that differs in how it unpacks.
func containerd22() harness.ContainerdVersion {
	v := harness.Containerd2()
	v.Name, v.Command = "2.2.9", []string{filepath.Join(harness.Tools, "containerd-2.2.9/containerd")}
	return v
}

// recordedNode is a node whose pilot says what its images need.
type recordedNode struct {
	*harness.Node
	t      *testing.T
	broker string
	args   []string
	pilot  *harness.Process
	client *harness.PilotClient
}

func newRecordedNode(t *testing.T, v harness.ContainerdVersion, broker string, args ...string) *recordedNode {
	t.Helper()
	n := &recordedNode{t: t, broker: broker}
	home := harness.TempDir(t)
	n.args = append([]string{"--admin-listen", "unix://" + home + "/admin.sock"}, args...)
	n.pilot, _ = harness.StartPilot(t, home, broker, n.args...)
	n.Node = harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: v})
	n.client = harness.NewPilotClient(t, home)
	harness.Await(t, "pilot's admin socket", harness.Reachable(home+"/admin.sock"))
	return n
}

// restart restarts pilot, with something done in between.
func (n *recordedNode) restart(between func(record string)) {
	n.t.Helper()
	n.pilot.Stop(n.t)
	between(n.Dir + "/layers")
	n.pilot, _ = harness.StartPilot(n.t, n.Dir, n.broker, n.args...)
	harness.Await(n.t, "pilot's admin socket", harness.Reachable(n.Dir+"/admin.sock"))
}

func (n *recordedNode) pull(images ...string) {
	n.t.Helper()
	for _, image := range images {
		harness.Output(n.t, n.Crictl("pull", image))
	}
}

func (n *recordedNode) needs(image string) harness.ImageKeys {
	n.t.Helper()
	return n.client.ImageKeys(n.t, "k8s.io", image)
}

// expect checks what each of the two layers of an image needs: the KEKs one of which is
// enough, with commas between them, and a part of why, or "" if the image says so itself.
// What pilot can't find out within a second it says later.
func (n *recordedNode) expect(image, keks, why string) {
	n.t.Helper()
	want := 2
	if keks == "" {
		want = 0
	}
	harness.Await(n.t, image, func() error {
		answer := n.needs(image)
		if len(answer.Layers) != want {
			return fmt.Errorf("want %d layers that need a key: %+v", want, answer)
		}
		for _, l := range answer.Layers {
			var got []string
			for _, k := range l.KEKs {
				got = append(got, fmt.Sprintf("%s/%d", k.ID, k.Version))
			}
			slices.Sort(got)
			if strings.Join(got, ",") != keks || l.Other || (why == "") != (l.Why == "") || !strings.Contains(l.Why, why) {
				return fmt.Errorf("want %s, %q: %+v", keks, why, l)
			}
		}
		return nil
	})
}

func (n *recordedNode) fetch(image string) {
	n.t.Helper()
	harness.Output(n.t, n.Ctr("--namespace", "k8s.io", "content", "fetch", "--plain-http", image))
}

// twoLayers makes an image of content that no other image has, of the plain layers of which
// several are made.
func twoLayers(c *harness.CI, name string, k harness.LayerKind, recipient string) string {
	c.T.Helper()
	l := harness.NewLayout(c.T)
	secret := harness.NewSecret()
	hello := harness.Read(c.T, filepath.Join(harness.Bin, "hello"))
	program, programID := l.Layer(k, k.OCI, map[string][]byte{"hello": []byte(hello + secret)})
	data, dataID := l.Layer(k, k.OCI, map[string][]byte{"secret": []byte(secret)})
	config := l.JSON("application/vnd.oci.image.config.v1+json", harness.Object{
		"architecture": harness.Arch, "os": "linux", "config": harness.Object{"Cmd": []string{"/hello"}},
		"rootfs": harness.Object{"type": "layers", "diff_ids": []string{programID, dataID}},
	})
	image := l.JSON("application/vnd.oci.image.manifest.v1+json", harness.Object{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": []harness.Object{program, data}})
	name = c.Registry + "/" + name
	c.Publish(l, name, image, recipient)
	c.Secrets[name] = secret
	harness.Output(c.T, c.CtrPilot("images", "push", "--plain-http", name+"-plain"))
	return name
}

// TestContainersNeedTheKeysOfWhatIsUnpacked has images that say otherwise, or nothing.
func TestContainersNeedTheKeysOfWhatIsUnpacked(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.JWE)
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a", "team-b")
	gzip, zstd := harness.LayerKinds[1], harness.LayerKinds[2]
	a := twoLayers(c, "a:1", gzip, "provider:pilot:team-a")
	other := twoLayers(c, "other:1", zstd, "provider:pilot:team-b")
	forB, rewrapped := c.Registry+"/a-for-b:1", c.Registry+"/a-rewrapped:1"
	harness.Output(t, c.CtrPilot("images", "encrypt", "--recipient", "provider:pilot:team-b", a+"-plain", forB))
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", forB))
	harness.Output(t, c.CtrPilot("images", "rewrap", "--recipient", "provider:pilot:team-b", "--remove", "provider:pilot:team-a", a, rewrapped))
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", rewrapped))
	// Those that have the configuration of a, which is public, and none of its keys.
	garbage := c.Edit(a, "garbage", func(m *ocispec.Manifest) {
		for i := range m.Layers {
			b := []byte(fmt.Sprint("no layer ", i))
			m.Layers[i] = ocispec.Descriptor{MediaType: gzip.OCI, Digest: c.Put(a, "_layers", b), Size: int64(len(b))}
		}
	})
	var others []ocispec.Descriptor
	c.Edit(other, "read", func(m *ocispec.Manifest) { others = m.Layers })
	foreign := c.Edit(a, "foreign", func(m *ocispec.Manifest) {
		for _, l := range others {
			c.Put(a, "_layers", []byte(harness.Read(t, c.Blob(l.Digest.String()))))
		}
		m.Layers = others
	})
	const annotation = "org.opencontainers.image.enc.keys.provider.pilot"
	added := c.Edit(a, "added", func(m *ocispec.Manifest) {
		for i := range m.Layers {
			b, err := base64.StdEncoding.DecodeString(m.Layers[i].Annotations[annotation])
			if err != nil {
				t.Fatal(err)
			}
			lie := base64.StdEncoding.EncodeToString([]byte(strings.Replace(string(b), "team-a", "team-b", 1)))
			m.Layers[i].Annotations[annotation] = lie + "," + m.Layers[i].Annotations[annotation]
		}
	})
	// Forged: its layer can't have that diff ID.
	chain := c.Edit(a, "chain", func(m *ocispec.Manifest) {
		var config map[string]any
		if err := json.Unmarshal([]byte(harness.Read(t, c.Blob(m.Config.Digest.String()))), &config); err != nil {
			t.Fatal(err)
		}
		rootfs := config["rootfs"].(map[string]any)
		var ids []digest.Digest
		for _, d := range rootfs["diff_ids"].([]any) {
			ids = append(ids, digest.Digest(d.(string)))
		}
		rootfs["diff_ids"] = []digest.Digest{identity.ChainID(ids)}
		b, err := json.Marshal(config)
		if err != nil {
			t.Fatal(err)
		}
		m.Config.Digest, m.Config.Size = c.Put(a, "_layers", b), int64(len(b))
		b = []byte("no layer at all")
		m.Layers = []ocispec.Descriptor{{MediaType: gzip.OCI, Digest: c.Put(a, "_layers", b), Size: int64(len(b))}}
	})
	secret := harness.NewSecret()
	l := harness.NewLayout(t)
	index := c.Registry + "/index:1"
	c.Publish(l, index, l.Index(gzip, secret), "provider:pilot:team-a")
	private, public := harness.KeyPair(t, dir+"/keys")
	jwe := twoLayers(c, "jwe:1", gzip, "jwe:"+public)

	for _, v := range []harness.ContainerdVersion{harness.Containerd2(), containerd22(), harness.Containerd17()} {
		t.Run(v.Name, func(t *testing.T) {
			t.Parallel()
			n := newRecordedNode(t, v, c.BrokerURL, "--decryption-keys-path", filepath.Dir(private))
			n.pull(a, garbage, foreign, added, a+"-plain", forB, rewrapped)
			n.fetch(chain)
			const unproven = "nothing shows that the image's own has the same content"
			expectAll := func() {
				t.Helper()
				n.expect(a, "team-a/1", "")
				n.expect(garbage, "team-a/1", unproven)
				n.expect(foreign, "team-a/1", unproven)
				n.expect(added, "team-a/1", "")
				n.expect(a+"-plain", "team-a/1", unproven)
				n.expect(forB, "team-a/1", unproven)
				if err := n.client.ImageKeysError(t, "k8s.io", chain); !strings.Contains(err, "it is the chain ID of other layers") {
					t.Errorf("%s: %s", chain, err)
				}
			}
			expectAll()
			n.restart(func(string) {})
			expectAll()
			// The same blob, with a key that was wrapped again.
			n.expect(rewrapped, "team-a/1,team-b/1", "")

			n.restart(func(record string) {
				if err := os.Remove(record); err != nil {
					t.Error(err)
				}
			})
			n.expect(a, "team-a/1", "")
			n.expect(garbage, "team-a/1", unproven)
			n.expect(foreign, "team-a/1", unproven)
			n.expect(added, "team-a/1", "")

			n.fetch(a + "-plain")
			n.expect(a+"-plain", "", "")
			n.expect(garbage, "team-a/1", unproven)
			n.fetch(garbage)
			n.expect(garbage, "team-a/1", "its content has the digest")
			n.fetch(foreign)
			n.expect(foreign, "team-a/1", "its content has the digest")
			n.fetch(forB)
			n.expect(forB, "team-a/1,team-b/1", "")
			n.expect(garbage, "team-a/1,team-b/1", "its content has the digest")

			// A public image is there first, and then somebody encrypts the same layers.
			n.pull(other+"-plain", other)
			n.expect(other+"-plain", "", "")
			n.expect(other, "team-b/1", "")
			n.pull(index)
			n.expect(index, "team-a/1", "")
			n.pull(jwe)
			if answer := n.needs(jwe); len(answer.Layers) != 2 || !answer.Layers[0].Other || answer.Layers[0].KEKs != nil {
				t.Errorf("a private key's: %+v", answer)
			}
			n.ExpectNoTraces(t)
		})
	}
}

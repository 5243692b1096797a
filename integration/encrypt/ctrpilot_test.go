package encrypt

import (
	"encoding/json"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestEncryptPushPullRun does the main job: an image is encrypted on one
// machine, and pulled and run on another.
func TestEncryptPushPullRun(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	_, brokerURL := harness.StartBroker(t, dir+"/broker", "team-a", "team-b")
	_, strangerURL := harness.StartBroker(t, dir+"/other", "team-b")
	_, ociConf := harness.StartPilot(t, dir+"/ci", brokerURL)
	_, strangerConf := harness.StartPilot(t, dir+"/stranger", strangerURL)
	latest := harness.Containerd2()
	ci := harness.NewNode(t, dir+"/ci", latest, ociConf, "")
	receiver := harness.NewNode(t, dir+"/node", latest, ociConf, "")
	stranger := harness.NewNode(t, dir+"/stranger", latest, strangerConf, "")
	address, storage := harness.StartRegistry(t, dir)

	builds := map[string]func(l *harness.Layout, k harness.LayerKind, secret string) harness.Object{
		"oci": func(l *harness.Layout, k harness.LayerKind, secret string) harness.Object {
			return l.Image(k, false, runtime.GOARCH, secret)
		},
		"docker": func(l *harness.Layout, k harness.LayerKind, secret string) harness.Object {
			return l.Image(k, true, runtime.GOARCH, secret)
		},
		"index": func(l *harness.Layout, k harness.LayerKind, secret string) harness.Object { return l.Index(k, secret) },
	}
	// Each format and each kind of layer is tested once where time is short.
	first := map[string]string{"oci": "zstd", "docker": "gzip", "index": "tar"}
	for format, build := range builds {
		for _, k := range harness.LayerKinds {
			t.Run(format+"/"+k.Name, func(t *testing.T) {
				if first[format] != k.Name {
					harness.Long(t)
				}
				secret := harness.NewSecret()
				name := fmt.Sprintf("%s/%s-%s", address, format, k.Name)
				plain, encrypted := name+":plain", name+":encrypted"
				l := harness.NewLayout(t)
				archive := l.Tar(dir+"/image.tar", plain, build(l, k, secret))
				harness.Output(t, ci.CtrPilot("images", "import", "--all-platforms", archive))

				harness.Output(t, ci.CtrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", plain, encrypted))
				var info struct {
					FullyEncrypted bool
					Layers         []struct {
						Platform, Digest, MediaType string
						Encrypted                   bool
						Recipients                  []string
					}
				}
				if err := json.Unmarshal([]byte(harness.Output(t, ci.CtrPilot("images", "layerinfo", "--json", encrypted))), &info); err != nil {
					t.Fatal(err)
				}
				for _, layer := range info.Layers {
					mediaType := k.OCI
					if strings.Contains(layer.Platform, "unknown") {
						mediaType = "application/vnd.in-toto+json"
					}
					if !layer.Encrypted || len(layer.Recipients) != 1 || layer.Recipients[0] != "team-a@1" || layer.MediaType != mediaType+"+encrypted" {
						t.Errorf("layerinfo: %+v", layer)
					}
				}
				if want := map[string]int{"index": 5}[format]; len(info.Layers) != max(want, 2) || !info.FullyEncrypted {
					t.Errorf("layerinfo shows %d layers, fully encrypted: %v", len(info.Layers), info.FullyEncrypted)
				}
				harness.Output(t, ci.CtrPilot("images", "push", "--plain-http", encrypted))
				if k.Name == "tar" && harness.ContainsText(t, storage, secret) {
					t.Error("the secret is in the registry")
				}

				// It comes back as it was.
				harness.Output(t, ci.CtrPilot("images", "decrypt", encrypted, name+":decrypted"))
				if got, want := ci.Target(name+":decrypted"), ci.Target(plain); got != want {
					t.Errorf("decrypted: %s, was %s", got, want)
				}

				// Another KEK as a second recipient touches no layer.
				before := harness.Output(t, ci.CtrPilot("images", "layerinfo", encrypted))
				harness.Output(t, ci.CtrPilot("images", "encrypt", "--recipient", "provider:pilot:team-b", encrypted, name+":both"))
				after := harness.Output(t, ci.CtrPilot("images", "layerinfo", name+":both"))
				if strings.ReplaceAll(strings.ReplaceAll(after, "team-a@1, team-b@1", "team-a@1"), " ", "") != strings.ReplaceAll(before, " ", "") {
					t.Errorf("with a second recipient:\n%s\nbefore:\n%s", after, before)
				}
				harness.Output(t, ci.CtrPilot("images", "push", "--plain-http", name+":both"))

				harness.Output(t, receiver.CtrPilot("images", "pull", "--plain-http", encrypted))
				if out := harness.ContainerOutput(t, receiver.CtrPilot("run", "--rm", encrypted, harness.ContainerID())); !strings.Contains(out, "hello, "+secret) {
					t.Errorf("run: %s", out)
				}

				// A node without the KEK gets the image, but nothing out of it.
				harness.ExpectFailure(t, stranger.CtrPilot("images", "pull", "--plain-http", encrypted), "layer sha256:", `KEK "team-a"`, "no such KEK")
				harness.ExpectFailure(t, stranger.CtrPilot("run", "--rm", encrypted, harness.ContainerID()), "not authorized", `KEK "team-a"`)
				harness.ExpectFailure(t, stranger.CtrPilot("images", "decrypt", encrypted), "layer sha256:", `KEK "team-a"`)
				if out := harness.Output(t, stranger.CtrPilot("snapshots", "list")); strings.Contains(out, "sha256:") {
					t.Errorf("the stranger has snapshots:\n%s", out)
				}
				harness.Output(t, stranger.CtrPilot("images", "remove", encrypted))
				// It has team-b.
				harness.Output(t, stranger.CtrPilot("images", "pull", "--plain-http", name+":both"))
				if out := harness.ContainerOutput(t, stranger.CtrPilot("run", "--rm", name+":both", harness.ContainerID())); !strings.Contains(out, secret) {
					t.Errorf("run with the second recipient: %s", out)
				}
				for _, n := range []*harness.Node{ci, receiver, stranger} {
					n.ExpectNothingPending()
				}
				for _, s := range strings.Fields(harness.Output(t, stranger.CtrPilot("images", "list", "-q"))) {
					harness.Output(t, stranger.CtrPilot("images", "remove", "--sync", s))
				}
			})
		}
	}
}

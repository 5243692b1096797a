package integration

import (
	"encoding/json"
	"fmt"
	"runtime"
	"strings"
	"testing"
)

// TestEncryptPushPullRun does the main job: an image is encrypted on one
// machine, and pulled and run on another.
func TestEncryptPushPullRun(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a", "team-b")
	_, strangerURL := broker(t, dir+"/other", "team-b")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	_, strangerConf := pilot(t, dir+"/stranger", strangerURL)
	latest := containerd2()
	ci := newNode(t, dir+"/ci", latest, ociConf, "")
	receiver := newNode(t, dir+"/node", latest, ociConf, "")
	stranger := newNode(t, dir+"/stranger", latest, strangerConf, "")
	address, storage := registry(t, dir)

	builds := map[string]func(l *layout, k kind, secret string) object{
		"oci":    func(l *layout, k kind, secret string) object { return l.image(k, false, runtime.GOARCH, secret) },
		"docker": func(l *layout, k kind, secret string) object { return l.image(k, true, runtime.GOARCH, secret) },
		"index":  func(l *layout, k kind, secret string) object { return l.index(k, secret) },
	}
	for format, build := range builds {
		for _, k := range kinds {
			t.Run(format+"/"+k.name, func(t *testing.T) {
				secret := newSecret()
				name := fmt.Sprintf("%s/%s-%s", address, format, k.name)
				plain, encrypted := name+":plain", name+":encrypted"
				l := newLayout(t)
				archive := l.tar(dir+"/image.tar", plain, build(l, k, secret))
				output(t, ci.ctrPilot("images", "import", "--all-platforms", archive))

				output(t, ci.ctrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", plain, encrypted))
				var info struct {
					FullyEncrypted bool
					Layers         []struct {
						Platform, Digest, MediaType string
						Encrypted                   bool
						Recipients                  []string
					}
				}
				if err := json.Unmarshal([]byte(output(t, ci.ctrPilot("images", "layerinfo", "--json", encrypted))), &info); err != nil {
					t.Fatal(err)
				}
				for _, layer := range info.Layers {
					mediaType := k.oci
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
				output(t, ci.ctrPilot("images", "push", "--plain-http", encrypted))
				if k.name == "tar" && contains(t, storage, secret) {
					t.Error("the secret is in the registry")
				}

				// It comes back as it was.
				output(t, ci.ctrPilot("images", "decrypt", encrypted, name+":decrypted"))
				if got, want := ci.target(name+":decrypted"), ci.target(plain); got != want {
					t.Errorf("decrypted: %s, was %s", got, want)
				}

				// Another KEK as a second recipient touches no layer.
				before := output(t, ci.ctrPilot("images", "layerinfo", encrypted))
				output(t, ci.ctrPilot("images", "encrypt", "--recipient", "provider:pilot:team-b", encrypted, name+":both"))
				after := output(t, ci.ctrPilot("images", "layerinfo", name+":both"))
				if strings.ReplaceAll(strings.ReplaceAll(after, "team-a@1, team-b@1", "team-a@1"), " ", "") != strings.ReplaceAll(before, " ", "") {
					t.Errorf("with a second recipient:\n%s\nbefore:\n%s", after, before)
				}
				output(t, ci.ctrPilot("images", "push", "--plain-http", name+":both"))

				output(t, receiver.ctrPilot("images", "pull", "--plain-http", encrypted))
				if out := containerOutput(t, receiver.ctrPilot("run", "--rm", encrypted, containerID())); !strings.Contains(out, "hello, "+secret) {
					t.Errorf("run: %s", out)
				}

				// A node without the KEK gets the image, but nothing out of it.
				fails(t, stranger.ctrPilot("images", "pull", "--plain-http", encrypted), "layer sha256:", `KEK "team-a"`, "no such KEK")
				fails(t, stranger.ctrPilot("run", "--rm", encrypted, containerID()), "not authorized", `KEK "team-a"`)
				fails(t, stranger.ctrPilot("images", "decrypt", encrypted), "layer sha256:", `KEK "team-a"`)
				if out := output(t, stranger.ctrPilot("snapshots", "list")); strings.Contains(out, "sha256:") {
					t.Errorf("the stranger has snapshots:\n%s", out)
				}
				output(t, stranger.ctrPilot("images", "remove", encrypted))
				// It has team-b.
				output(t, stranger.ctrPilot("images", "pull", "--plain-http", name+":both"))
				if out := containerOutput(t, stranger.ctrPilot("run", "--rm", name+":both", containerID())); !strings.Contains(out, secret) {
					t.Errorf("run with the second recipient: %s", out)
				}
				for _, n := range []*node{ci, receiver, stranger} {
					n.nothingPending()
				}
				for _, s := range strings.Fields(output(t, stranger.ctrPilot("images", "list", "-q"))) {
					output(t, stranger.ctrPilot("images", "remove", "--sync", s))
				}
			})
		}
	}
}

package encrypt

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestRewrapRegistry moves images in a registry, without a containerd, and without
// asking for a layer.
func TestRewrapRegistry(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	copilot, brokerURL := harness.StartBroker(t, dir+"/broker", "team-a", "team-b")
	_, ociConf := harness.StartPilot(t, dir+"/ci", brokerURL)
	c := harness.NewNode(t, dir+"/ci", harness.Containerd2(), ociConf, "")
	address, _ := harness.StartRegistry(t, dir)
	w := harness.RecordRegistry(t, address)
	app := w.Address + "/team/app:"
	l := harness.NewLayout(t)
	harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", "--all-platforms", l.Tar(dir+"/image.tar", app+"plain", l.Index(harness.LayerKinds[1], harness.NewSecret()))))
	single := harness.NewLayout(t)
	harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", single.Tar(dir+"/single.tar", app+"single-plain", single.Image(harness.LayerKinds[0], false, harness.Arch, harness.NewSecret()))))
	harness.Output(t, c.CtrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", app+"plain", app+"1"))
	harness.Output(t, c.CtrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", app+"single-plain", app+"single"))
	for _, tag := range []string{"1", "single", "plain"} {
		harness.Output(t, c.CtrPilot("images", "push", "--plain-http", app+tag))
	}
	for _, tag := range []string{"2", "3", "4", "5"} {
		harness.Output(t, c.CtrPilot("images", "tag", app+"1", app+tag))
		harness.Output(t, c.CtrPilot("images", "push", "--plain-http", app+tag))
	}
	rewrap := func(args ...string) *exec.Cmd {
		t.Helper()
		cmd := harness.Command(t, "ctr-pilot", append([]string{"--address", dir + "/nobody.sock", "images", "rewrap", "--registry", "--plain-http"}, args...)...)
		cmd.Env = append(cmd.Environ(), "OCICRYPT_KEYPROVIDER_CONFIG="+ociConf, "TMPDIR="+dir)
		return cmd
	}
	unchanged := func(tag string, do func()) {
		t.Helper()
		before, _ := w.Manifest("GET", "team/app", tag, "", "")
		do()
		if got, _ := w.Manifest("GET", "team/app", tag, "", ""); got != before {
			t.Errorf("%s is\n%s\nwas\n%s", tag, got, before)
		}
		if left, _ := filepath.Glob(dir + "/ctr-pilot-*"); len(left) > 0 {
			t.Errorf("left behind: %s", left)
		}
	}
	had, _ := w.KEKs("team/app", "1")

	unchanged("1", func() {
		if out := harness.Output(t, rewrap(app+"1")); !strings.Contains(out, "is up to date") {
			t.Errorf("up to date: %s", out)
		}
		harness.RotateKEK(t, dir+"/broker", "team-a")
		if out := harness.Output(t, rewrap("--dry-run", app+"1")); !strings.Contains(out, "would change (3 layers: ") {
			t.Errorf("dry run: %s", out)
		}
	})
	requests := w.Record(nil, func() { harness.Output(t, rewrap(app+"1")) })
	// What the tag is, the index, two manifests and an attestation; what refers to each of
	// those; three manifests that are new, what the tag is now, and its new index.
	counts := map[string]int{}
	for _, r := range requests {
		method, path, _ := strings.Cut(r, " ")
		switch {
		case strings.Contains(path, "/referrers/") || strings.Contains(path, "/manifests/sha256-"):
			counts["referrers"]++
		case !strings.Contains(path, "/manifests/"):
			t.Errorf("request %s", r)
		default:
			counts[method]++
		}
	}
	if counts["GET"] != 4 || counts["PUT"] != 4 || counts["HEAD"] != 2 || counts["referrers"] != 4*5 {
		t.Errorf("requests: %v %q", counts, requests)
	}
	has, keks := w.KEKs("team/app", "1")
	if !slices.Equal(had, has) || keks["s390x"] != "team-a@2" || keks[harness.Arch] != "team-a@2" {
		t.Errorf("layers %s, were %s, wrapped with %v", has, had, keks)
	}
	harness.Output(t, c.CtrPilot("images", "remove", "--sync", app+"1"))
	harness.Output(t, c.CtrPilot("content", "fetch", "--plain-http", "--all-platforms", app+"1"))
	harness.Output(t, c.CtrPilot("images", "decrypt", app+"1", app+"decrypted"))
	if got, want := c.Target(app+"decrypted"), c.Target(app+"plain"); got != want {
		t.Errorf("decrypted to %s, was %s", got, want)
	}

	// The platform of a single image is in its configuration.
	requests = w.Record(nil, func() { harness.Output(t, rewrap("--platform", "linux/"+harness.Arch, app+"single")) })
	layers, _ := w.KEKs("team/app", "single")
	blobs := slices.DeleteFunc(requests, func(r string) bool { return !strings.Contains(r, "/blobs/") })
	if len(blobs) == 0 || slices.ContainsFunc(blobs, func(r string) bool { return slices.Contains(layers, filepath.Base(r)) }) {
		t.Errorf("for a platform, blobs: %q", blobs)
	}
	requests = w.Record(nil, func() { harness.Output(t, rewrap("--platform", "linux/s390x", app+"2", app+"s390x")) })
	if _, keks = w.KEKs("team/app", "s390x"); keks["s390x"] != "team-a@2" || keks[harness.Arch] != "team-a@1" {
		t.Errorf("one platform: %v, requests %q", keks, requests)
	}

	t.Run("names", func(t *testing.T) {
		harness.ExpectFailure(t, rewrap(app+"2", app+"1"), "image "+app+"1 already exists")
		harness.ExpectFailure(t, rewrap(app+"nobody"), "not found")
		byDigest := w.Address + "/team/app@" + c.Target(app+"2")
		harness.ExpectFailure(t, rewrap(byDigest), "give it a new name")
		harness.Output(t, rewrap(byDigest, app+"by-digest"))
		if _, keks := w.KEKs("team/app", "by-digest"); keks["s390x"] != "team-a@2" {
			t.Errorf("by digest: %v", keks)
		}
	})
	t.Run("to another repository", func(t *testing.T) {
		requests := w.Record(nil, func() { harness.Output(t, rewrap(app+"2", w.Address+"/team/other:2")) })
		mounts := 0
		for _, r := range requests {
			method, path, _ := strings.Cut(r, " ")
			if method == "PATCH" || method == "PUT" && !strings.Contains(path, "/manifests/") {
				t.Errorf("bytes of blobs were moved: %s", r)
			}
			if method == "POST" {
				mounts++
			}
		}
		has, keks := w.KEKs("team/other", "2")
		if !slices.Equal(has, had) || keks["s390x"] != "team-a@2" || mounts < len(has) {
			t.Errorf("layers %s, were %s, wrapped with %v; %d mounts", has, had, keks, mounts)
		}
	})
	t.Run("changed while it is rewrapped", func(t *testing.T) {
		other, mediaType := w.Manifest("GET", "team/app", "plain", "", "")
		var once sync.Once
		w.Record(func(method, path string) {
			if method == "PUT" && strings.Contains(path, "sha256:") {
				once.Do(func() { w.Manifest("PUT", "team/app", "3", mediaType, other) })
			}
		}, func() {
			harness.ExpectFailure(t, rewrap(app+"3"), app+"3 was changed while this command ran, and stays as it is")
		})
		if now, _ := w.Manifest("GET", "team/app", "3", "", ""); now != other {
			t.Error("the other's work was overwritten")
		}
	})
	t.Run("tampered", func(t *testing.T) {
		doc, mediaType := w.Manifest("GET", "team/app", "single", "", "")
		at := strings.Index(doc, `keys.provider.pilot":"`) + 60
		changed := doc[:at] + string(doc[at]^1) + doc[at+1:]
		if doc[at] == 'Z' || doc[at] == '9' || doc[at] == '/' {
			changed = doc[:at] + "A" + doc[at+1:]
		}
		w.Manifest("PUT", "team/app", "tampered", mediaType, changed)
		unchanged("tampered", func() {
			harness.ExpectFailure(t, rewrap("--from", "team-a", "--to", "team-a", app+"tampered"), "layer sha256:")
		})
	})
	t.Run("stopped", func(t *testing.T) {
		cmd := rewrap(app+"2", app+"4", app+"5")
		var out strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &out
		unchanged("4", func() {
			w.Record(func(_, path string) {
				if strings.HasSuffix(path, "/4") {
					cmd.Process.Signal(syscall.SIGINT)
					harness.Await(t, "it has ended", func() error {
						if err := cmd.Process.Signal(syscall.Signal(0)); !errors.Is(err, os.ErrProcessDone) {
							return fmt.Errorf("it has not: %v", err)
						}
						return nil
					})
				}
			}, func() {
				if err := cmd.Run(); err == nil {
					t.Error("it exited with 0")
				}
			})
		})
		if !strings.Contains(out.String(), "3 images: 1 changed, 0 up to date, 0 not encrypted, 0 failed, 2 not tried") || !strings.Contains(out.String(), app+"2 sha256:") {
			t.Errorf("stopped:\n%s", out.String())
		}
	})
	t.Run("pattern", func(t *testing.T) {
		// "tampered" fails, and the others are done.
		out := harness.ExpectFailure(t, rewrap(app+"*"), "ctr-pilot: "+app+"tampered: ", "10 images: 3 changed, 4 up to date, 2 not encrypted, 1 failed")
		for _, tag := range []string{"1", "2", "4", "5", "s390x", "by-digest", "single"} {
			if _, keks := w.KEKs("team/app", tag); !strings.Contains(out, app+tag+" ") || len(keks) == 0 || slices.ContainsFunc([]string{keks[harness.Arch] + keks[""]}, func(s string) bool { return s != "team-a@2" }) {
				t.Errorf("%s: %v", tag, keks)
			}
		}
	})
	t.Run("no broker", func(t *testing.T) {
		copilot.Stop(t)
		unchanged("1", func() {
			harness.ExpectFailure(t, rewrap("--from", "team-a", "--to", "team-b", app+"1"), "gives no usable answer")
		})
	})
}

package encrypt

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// rewrapResult is the JSON of rewrap for an image.
type rewrapResult struct {
	Image, Result, Digest, Error string
	Moved                        struct{ Written, Copied, Mounted, Present int64 }
	Referrers                    []referrer
}

func (a anywhere) rewrap(args ...string) []rewrapResult {
	a.t.Helper()
	var r []rewrapResult
	if err := json.Unmarshal([]byte(harness.Output(a.t, a.images(append([]string{"rewrap", "--json"}, args...)...))), &r); err != nil {
		a.t.Fatal(err)
	}
	return r
}

// layers returns the digests of an image's layers, and the recipients of all of them.
func (a anywhere) layers(name string) (digests []string, recipients string) {
	a.t.Helper()
	var info struct {
		Layers []struct {
			Digest     string
			Recipients []string
		}
	}
	if err := json.Unmarshal([]byte(harness.Output(a.t, a.images("layerinfo", "--json", name))), &info); err != nil {
		a.t.Fatal(err)
	}
	var all []string
	for _, l := range info.Layers {
		digests = append(digests, l.Digest)
		all = append(all, strings.Join(l.Recipients, "+"))
	}
	slices.Sort(all)
	return digests, strings.Join(slices.Compact(all), " ")
}

// TestRewrapEachTransport moves an image to a new version of its KEK where it is, and to
// another KEK from each transport into each other, and has skopeo decrypt what was written.
func TestRewrapEachTransport(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	dir := harness.TempDir(t)
	a := newEverywhere(t, dir, "team-a", "team-b")
	d, registry, distribution := a.debian, a.registry, a.distribution
	l := harness.NewLayout(t)
	secret := harness.NewSecret()
	l.Write(dir+"/plain", "v1", l.Image(harness.LayerKinds[1], false, harness.Arch, secret))
	places := a.targets
	for _, place := range places {
		a.crypt("encrypt", "--json", "--recipient", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", place)
	}
	harness.RotateKEK(t, dir+"/broker", "team-a")
	for i, place := range places {
		before, _ := a.layers(place)
		r := a.rewrap("--dry-run", place)[0]
		if _, keks := a.layers(place); r.Result != "wouldChange" || keks != "team-a@1" {
			t.Errorf("%s, dry: %+v, %s", place, r, keks)
		}
		r = a.rewrap(place)[0]
		inArchive := strings.HasPrefix(place, "oci-archive:")
		if r.Result != "changed" || r.Image != place || (r.Moved.Copied > 0) != inArchive || r.Moved.Mounted != 0 {
			t.Errorf("%s in place: %+v", place, r)
		}
		digests, keks := a.layers(place)
		if keks != "team-a@2" || !slices.Equal(digests, before) {
			t.Errorf("%s in place has layers %s, had %s, wrapped for %s", place, digests, before, keks)
		}
		if r := a.rewrap(place)[0]; r.Result != "upToDate" {
			t.Errorf("%s again: %+v", place, r)
		}
		for j, to := range []string{"oci:" + dir + "/to:%d", "oci-archive:" + dir + "/to%d.tar:x", "docker://" + registry + "/to:%d", "docker://" + distribution + "/to:%d", "docker://" + registry + "/enc:other%d"} {
			to = fmt.Sprintf(to, i)
			r := a.rewrap("--from", "team-a", "--to", "team-b", place, to)[0]
			if r.Result != "changed" || r.Image != to {
				t.Errorf("%s to %s: %+v", place, to, r)
			}
			// The places have images of their own, with the same configuration. From the
			// same registry it is mounted, and the layers are too.
			if within := i == 2 && j == 2 || i == 3 && j == 3; within && (r.Moved.Copied > 0 || r.Moved.Mounted == 0) {
				t.Errorf("%s to %s: %+v", place, to, r)
			}
			digests, keks := a.layers(to)
			if keks != "team-b@1" || !slices.Equal(digests, before) {
				t.Errorf("%s to %s has layers %s, had %s, wrapped for %s", place, to, digests, before, keks)
			}
			harness.ExpectFailure(t, a.images("rewrap", "--from", "team-a", "--to", "team-b", place, to), "image "+to+" already exists")
			back := fmt.Sprintf("%s/back%d-%d", dir, i, j)
			harness.Output(t, d.Run("skopeo", "copy", "--src-tls-verify=false", "--decryption-key", "provider:pilot:team-b", to, "oci:"+back+":x"))
			if !strings.Contains(blobs(t, back), secret) {
				t.Errorf("the secret is not in what skopeo decrypted from %s", to)
			}
			os.RemoveAll(back)
		}
	}

	t.Run("many", func(t *testing.T) {
		harness.RotateKEK(t, dir+"/broker", "team-b")
		r := a.rewrap("oci:"+dir+"/to:*", "docker://"+distribution+"/to:?", "oci-archive:"+dir+"/to0.tar:x", "docker://"+registry+"/to:0")
		changed := 0
		for _, r := range r {
			if r.Result == "changed" {
				changed++
			}
			if _, keks := a.layers(r.Image); keks != "team-b@2" {
				t.Errorf("%+v has %s", r, keks)
			}
		}
		if len(r) != 10 || changed != 10 {
			t.Errorf("%d images, %d changed: %+v", len(r), changed, r)
		}
	})
	t.Run("an image without a name", func(t *testing.T) {
		a.crypt("encrypt", "--json", "--recipient", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", "oci:"+dir+"/unnamed")
		for _, place := range []string{"oci:" + dir + "/unnamed", "oci:" + dir + "/enc"} {
			harness.RotateKEK(t, dir+"/broker", "team-a")
			if r := a.rewrap(place)[0]; r.Result != "changed" {
				t.Errorf("%+v", r)
			}
			// It is still the only one.
			if r := a.rewrap(place)[0]; r.Result != "upToDate" {
				t.Errorf("%+v", r)
			}
		}
		a.layers("oci:" + dir + "/enc:x")
	})
	t.Run("an archive of several images", func(t *testing.T) {
		harness.Output(t, harness.Command(t, "tar", "-C", dir+"/to", "-cf", dir+"/several.tar", "."))
		harness.ExpectFailure(t, a.images("rewrap", "--from", "team-b", "--to", "team-a", "oci-archive:"+dir+"/several.tar:1"), "its file would be replaced with all that it holds")
		a.rewrap("--from", "team-b", "--to", "team-a", "oci-archive:"+dir+"/several.tar:1", "oci:"+dir+"/one:1")
	})
	if left, _ := os.ReadDir(dir + "/tmp"); len(left) > 0 {
		t.Errorf("temporary files: %v", left)
	}
}

// TestRewrapBetweenContainerdAndTransports moves an image out of containerd and back, with
// another KEK each time.
func TestRewrapBetweenContainerdAndTransports(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a", "team-b")
	l := harness.NewLayout(t)
	l.Write(dir+"/plain", "v1", l.Image(harness.LayerKinds[2], false, harness.Arch, harness.NewSecret()))
	harness.Output(t, c.CtrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", "containerd:app:enc"))
	digests, _ := wrappedFor(c.Node, "app:enc")
	names := []string{"app:enc", "docker://" + c.Registry + "/app:b", "containerd:app:back", "oci:" + dir + "/out:1"}
	keks := []string{"team-a", "team-b", "team-a", "team-b"}
	for i := range 3 {
		harness.Output(t, c.CtrPilot("images", "rewrap", "--from", keks[i], "--to", keks[i+1], names[i], names[i+1]))
		expectRecipients(c.Node, names[i+1], keks[i+1]+"@1", digests)
	}
	// What is in containerd outlives its garbage collection.
	harness.Output(t, c.CtrPilot("images", "rm", "--sync", "app:enc"))
	harness.Output(t, c.CtrPilot("images", "decrypt", "containerd:app:back", "app:plain"))
	c.ExpectNothingPending()
}

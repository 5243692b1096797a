package lazy

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestChangedChunkIsAnIOError changes ciphertext in the registry's storage, below the
// digest: reads of what was changed fail, and others are right.
func TestChangedChunkIsAnIOError(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	big := random(1, 24*mib)
	m.encrypt("app:1", layer{"a": []byte("first"), "big": big, "z": []byte("last")})
	l := layersOf(m.manifest("app:1"))[0]
	digest := l["digest"].(string)
	blob := m.blob(digest)
	// Somebody who knows the plain layer can change it to what they like.
	changed := bytes.Clone(blob)
	for i := range 1000 {
		changed[len(blob)/2+i] ^= 0x55
	}
	harness.Write(t, m.stored(digest), string(changed))
	m.pull("app:1")
	at := m.mount("app:1")
	if got, err := os.ReadFile(at + "/a"); err != nil || string(got) != "first" {
		t.Errorf("another file: %q %v", got, err)
	}
	bad := 0
	for off := 0; off < len(big); off += mib {
		part, err := readPart(at+"/big", off, mib)
		switch {
		case errors.Is(err, syscall.EIO):
			bad++
		case err != nil || !bytes.Equal(part, big[off:off+mib]):
			t.Errorf("at %d MiB: other bytes, and no error (%v)", off/mib, err)
		}
	}
	// A chunk has 4 MiB, and what was changed may be in two.
	if bad == 0 || bad > 8 {
		t.Errorf("%d of 24 reads failed", bad)
	}
	if got, err := os.ReadFile(at + "/z"); err != nil || string(got) != "last" {
		t.Errorf("a file after it: %q %v", got, err)
	}
	// The registry is mended: what had failed can be read.
	harness.Write(t, m.stored(digest), string(blob))
	if got, err := os.ReadFile(at + "/big"); !errors.Is(err, syscall.EIO) && (err != nil || !bytes.Equal(got, big)) {
		t.Errorf("other bytes, once the registry is itself again: %v", err)
	}
}

// clone returns a deep copy of a manifest.
func clone(t testing.TB, o harness.Object) (copied harness.Object) {
	t.Helper()
	b, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &copied); err != nil {
		t.Fatal(err)
	}
	return copied
}

func annotations(l harness.Object) map[string]any { return l["annotations"].(map[string]any) }

const (
	lazyAnnotation = "org.opencontainers.image.enc.pilot.lazy"
	tocAnnotation  = "containerd.io/snapshot/stargz/toc.digest"
)

// withLazy returns a change of a member of a layer's seal.
func withLazy(t testing.TB, member string, value any) func(l harness.Object) {
	return func(l harness.Object) {
		var seal map[string]any
		d := json.NewDecoder(strings.NewReader(annotations(l)[lazyAnnotation].(string)))
		d.UseNumber()
		if err := d.Decode(&seal); err != nil {
			t.Fatal(err)
		}
		if value == nil {
			delete(seal, member)
		} else {
			seal[member] = value
		}
		b, err := json.Marshal(seal)
		if err != nil {
			t.Fatal(err)
		}
		annotations(l)[lazyAnnotation] = string(b)
	}
}

// configOf returns the configuration of an image, and its diff IDs.
func (m *machine) configOf(manifest harness.Object) (config harness.Object, diffIDs []any) {
	m.t.Helper()
	if err := json.Unmarshal(m.blob(manifest["config"].(map[string]any)["digest"].(string)), &config); err != nil {
		m.t.Fatal(err)
	}
	return config, config["rootfs"].(map[string]any)["diff_ids"].([]any)
}

// withDiffIDs pushes a configuration with other diff IDs and returns its descriptor.
func (m *machine) withDiffIDs(repository string, manifest harness.Object, diffIDs ...any) harness.Object {
	m.t.Helper()
	config, _ := m.configOf(manifest)
	config["rootfs"].(map[string]any)["diff_ids"] = diffIDs
	b, err := json.Marshal(config)
	if err != nil {
		m.t.Fatal(err)
	}
	return m.pushBlob(repository, "application/vnd.oci.image.config.v1+json", b)
}

// TestChangedImageIsPulledWholeOrRefused has somebody who can write to the registry, and
// knows the plain images, change manifests and layers in all the ways they can think of. No
// byte of a changed layer reaches a container: it is pulled as a whole, and then it is right
// or refused.
func TestChangedImageIsPulledWholeOrRefused(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	first, second := layer{"file": []byte("of the image")}, layer{"other": random(7, mib)}
	m.encrypt("app:1", first, second)
	m.encrypt("app:other", layer{"file": []byte("of another image")}, layer{"other": random(8, mib)})
	good, other := m.manifest("app:1"), m.manifest("app:other")
	_, ids := m.configOf(good)
	_, otherIDs := m.configOf(other)
	zero := "sha256:" + strings.Repeat("0", 64)
	blobs := map[string][]byte{}
	for _, l := range append(layersOf(good), layersOf(other)...) {
		d := l["digest"].(string)
		blobs[d] = m.blob(d)
	}
	// change changes the first layer of a manifest.
	change := func(f func(l harness.Object)) func(o harness.Object) {
		return func(o harness.Object) { f(layersOf(o)[0]) }
	}
	annotate := func(key string, value any) func(o harness.Object) {
		return change(func(l harness.Object) {
			if value == nil {
				delete(annotations(l), key)
			} else {
				annotations(l)[key] = value
			}
		})
	}
	store := func(at func(blob []byte) int) func(o harness.Object) {
		return change(func(l harness.Object) {
			d := l["digest"].(string)
			b := bytes.Clone(blobs[d])
			b[at(b)] ^= 1
			harness.Write(t, m.stored(d), string(b))
		})
	}
	// fresh has a pilot that has seen nothing of the image yet.
	fresh := func(f func(o harness.Object)) func(o harness.Object) {
		return func(o harness.Object) {
			m.Pilot.Stop(t)
			m.StartPilot()
			f(o)
		}
	}
	var seal struct{ TailOffset int }
	if err := json.Unmarshal([]byte(annotations(layersOf(good)[0])[lazyAnnotation].(string)), &seal); err != nil {
		t.Fatal(err)
	}
	otherSeal := annotations(layersOf(other)[0])[lazyAnnotation]
	plainLayer := func() harness.Object {
		// The image's files, except the changed one, as plain eStargz.
		m.encrypt("app:evil", layer{"file": []byte("of the attacker")})
		r := m.lazyPlain("app:evil")
		l := m.pushBlob("app", "application/vnd.oci.image.layer.v1.tar+gzip", r)
		l["annotations"] = harness.Object{tocAnnotation: annotations(layersOf(m.manifest("app:evil"))[0])[tocAnnotation]}
		return l
	}()
	setLayer := func(i int, l harness.Object) func(o harness.Object) {
		return func(o harness.Object) { o["layers"].([]any)[i] = l }
	}
	const (
		right   = "right"
		refused = "refused"
	)
	for _, c := range []struct {
		what   string
		change func(o harness.Object)
		want   string
	}{
		{"nothing", func(harness.Object) {}, right},
		{"the seal is gone", annotate(lazyAnnotation, nil), right},
		{"the seal is that of another layer", annotate(lazyAnnotation, otherSeal), right},
		{"the seal is not JSON", annotate(lazyAnnotation, "x"), right},
		{"diff ID in the seal", change(withLazy(t, "diffID", zero)), right},
		{"TOC in the seal", change(withLazy(t, "toc", zero)), right},
		{"where the tail begins", change(withLazy(t, "tailOffset", seal.TailOffset-1)), right},
		{"a negative tail", change(withLazy(t, "tailOffset", -1)), right},
		{"digest of the tail", change(withLazy(t, "tail", zero)), right},
		{"the seal's HMAC", change(withLazy(t, "seal", base64.StdEncoding.EncodeToString(make([]byte, 32)))), right},
		{"no HMAC", change(withLazy(t, "seal", nil)), right},
		{"TOC digest of the annotation", annotate(tocAnnotation, zero), right},
		{"no TOC digest", annotate(tocAnnotation, nil), right},
		{"TOC digest of the other", annotate(tocAnnotation, annotations(layersOf(other)[0])[tocAnnotation]), right},
		{"verification is to be skipped", annotate("containerd.io/snapshot/remote/stargz.skipverify", "true"), right},

		{"a bit of the first chunk", store(func([]byte) int { return 60 }), ""},
		{"a bit of the tail, which is in memory", store(func([]byte) int { return seal.TailOffset + 20 }), right},
		{"a bit of the tail", fresh(store(func([]byte) int { return seal.TailOffset + 20 })), refused},
		{"a bit of the footer", fresh(store(func(b []byte) int { return len(b) - 10 })), refused},
		{"all of the tail", fresh(change(func(l harness.Object) {
			d := l["digest"].(string)
			b := bytes.Clone(blobs[d])
			for i := range b[seal.TailOffset:] {
				b[seal.TailOffset+i] ^= byte(i)
			}
			harness.Write(t, m.stored(d), string(b))
		})), refused},
		{"plain media type", change(func(l harness.Object) { l["mediaType"] = "application/vnd.oci.image.layer.v1.tar+gzip" }), refused},
		{"tar media type", change(func(l harness.Object) { l["mediaType"] = "application/vnd.oci.image.layer.v1.tar+encrypted" }), ""},
		{"diff ID of the configuration", func(o harness.Object) { o["config"] = m.withDiffIDs("app", good, zero, ids[1]) }, refused},
		{"diff IDs of the other image", func(o harness.Object) { o["config"] = m.withDiffIDs("app", good, otherIDs...) }, refused},
		{"one diff ID too many", func(o harness.Object) { o["config"] = m.withDiffIDs("app", good, ids[0], ids[1], zero) }, refused},
		{"layers swapped", func(o harness.Object) { l := o["layers"].([]any); l[0], l[1] = l[1], l[0] }, refused},
		{"a layer twice", func(o harness.Object) { l := o["layers"].([]any); l[0] = l[1] }, refused},
		{"a layer of the other image", setLayer(0, layersOf(other)[0]), refused},
		{"the annotations of the other layer", change(func(l harness.Object) { l["annotations"] = layersOf(other)[0]["annotations"] }), refused},
		{"a plain layer of the attacker", setLayer(0, plainLayer), refused},
		{"a plain layer with the annotations of the encrypted one", setLayer(0, func() harness.Object {
			l := clone(t, plainLayer)
			all := maps.Clone(annotations(layersOf(good)[0]))
			maps.Copy(all, annotations(plainLayer))
			l["annotations"] = all
			return l
		}()), refused},
		{"labels of a snapshot that name the other layer", change(func(l harness.Object) {
			for _, key := range []string{"containerd.io/snapshot/cri.layer-digest", "containerd.io/snapshot/remote/stargz.digest"} {
				annotations(l)[key] = layersOf(other)[0]["digest"]
			}
			for _, key := range []string{"containerd.io/snapshot/cri.image-ref", "containerd.io/snapshot/remote/stargz.reference"} {
				annotations(l)[key] = m.ref("app:other")
			}
			annotations(l)[tocAnnotation] = annotations(layersOf(other)[0])[tocAnnotation]
		}), right},
		{"a second configuration among the layers", func(o harness.Object) {
			o["layers"] = append(o["layers"].([]any), m.withDiffIDs("app", good, otherIDs...))
		}, refused},
	} {
		for d, b := range blobs {
			harness.Write(t, m.stored(d), string(b))
		}
		evil := clone(t, good)
		c.change(evil)
		m.push("app:evil", evil)
		out, err := m.pullCommand("app:evil").CombinedOutput()
		if err == nil {
			at := m.mount("app:evil")
			got, readErr := os.ReadFile(at + "/file")
			more, moreErr := os.ReadFile(at + "/other")
			switch {
			case readErr != nil || moreErr != nil || string(got) != "of the image" || !bytes.Equal(more, random(7, mib)):
				t.Errorf("%s: the image has other files: %.40q %v, %d bytes %v", c.what, got, readErr, len(more), moreErr)
			case c.want == refused:
				t.Errorf("%s: not refused", c.what)
			}
			m.unmount(at)
			m.remove("app:evil")
		} else if c.want == right {
			t.Errorf("%s: refused: %s", c.what, out)
		}
		m.CollectGarbage(t)
		if out := harness.Output(t, m.Ctr("snapshots", "--snapshotter", "pilot-lazy", "list")); strings.Contains(out, "sha256:") {
			t.Errorf("%s: snapshots are left:\n%s", c.what, out)
		}
	}
	if t.Failed() {
		t.Logf("full pulls: %v", m.fullPulls())
	}
}

// lazyPlain returns the plain blob of an image's only layer, which it has the mirror decrypt.
func (m *machine) lazyPlain(name string) []byte {
	m.t.Helper()
	repository, _, _ := strings.Cut(name, ":")
	m.pull(name)
	r := m.ask("GET", m.lazyPath(repository, layersOf(m.manifest(name))[0]["digest"].(string)), "0-")
	if r.status != 206 || r.err != nil {
		m.t.Fatalf("%s: %d %v", name, r.status, r.err)
	}
	m.remove(name)
	return []byte(r.body)
}

// TestNoSnapshotIsTakenForAnothers has somebody claim, with layers that are sealed, that one
// image's layer is another's: before and after the layers are mounted, under the same and
// under other names.
func TestNoSnapshotIsTakenForAnothers(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	read := func(name string) string {
		t.Helper()
		at := m.mount(name)
		defer func() { m.unmount(at) }()
		b, err := os.ReadFile(at + "/file")
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		return string(b)
	}
	m.encrypt("victim:1", layer{"file": []byte("of the victim")})
	m.encrypt("evil:1", layer{"file": []byte("of the attacker")})
	victim, evil := m.manifest("victim:1"), m.manifest("evil:1")
	_, ids := m.configOf(victim)
	// The attacker's layer is to be unpacked as the victim's.
	forged := clone(t, evil)
	forged["config"] = m.withDiffIDs("evil", evil, ids...)

	refused := func(what, name string) {
		t.Helper()
		out, err := m.pullCommand(name).CombinedOutput()
		if err == nil {
			t.Errorf("%s: not refused", what)
			m.remove(name)
		}
		if !strings.Contains(string(out), "diff") {
			t.Errorf("%s: containerd does not say that the diff ID is wrong: %s", what, out)
		}
		m.CollectGarbage(t)
	}
	m.push("evil:forged", forged)
	refused("before any is mounted", "evil:forged")

	// Once the attacker's layer is mounted, under another name and under its own.
	m.pull("evil:1")
	if got := read("evil:1"); got != "of the attacker" {
		t.Errorf("the attacker's own image has %q", got)
	}
	refused("once it is mounted", "evil:forged")
	m.push("evil:1", forged)
	refused("once it is mounted, under the same name", "evil:1")
	if got := read("evil:1"); got != "of the attacker" {
		t.Errorf("the attacker's own image has %q", got)
	}
	if reasons := m.fullPulls(); reasons["diff ID"] == 0 {
		t.Errorf("the metrics do not have it: %v", reasons)
	}
	if log := harness.Read(t, m.Pilot.Log); !strings.Contains(log, "made to have this layer taken for another") {
		t.Errorf("the log does not say so:\n%s", log)
	}

	// Annotations become labels, from which the snapshotter takes the layer to mount if
	// containerd's client does not set them.
	named := clone(t, victim)
	for _, key := range []string{"containerd.io/snapshot/cri.layer-digest", "containerd.io/snapshot/remote/stargz.digest"} {
		annotations(layersOf(named)[0])[key] = layersOf(evil)[0]["digest"]
	}
	for _, key := range []string{"containerd.io/snapshot/cri.image-ref", "containerd.io/snapshot/remote/stargz.reference"} {
		annotations(layersOf(named)[0])[key] = m.ref("evil:1")
	}
	annotations(layersOf(named)[0])[tocAnnotation] = annotations(layersOf(evil)[0])[tocAnnotation]
	m.push("victim:named", named)
	for _, args := range [][]string{nil, {"--local"}} {
		args = append(append([]string{"images", "pull", "--plain-http", "--snapshotter", "pilot-lazy"}, args...), m.ref("victim:named"))
		out, err := m.Ctr(args...).CombinedOutput()
		if err != nil {
			t.Errorf("%v: %s", args, out) // containerd can pull it as a whole
			continue
		}
		if got := read("victim:named"); got != "of the victim" {
			t.Errorf("%v: an image with annotations of the attacker has %q", args, got)
		}
		m.remove("victim:named")
	}

	m.pull("victim:1")
	if got := read("victim:1"); got != "of the victim" {
		t.Errorf("the victim's image has %q", got)
	}

	// While containerd has the forged manifest, it can't be mounted anew under any name, and
	// what is mounted is read on.
	m.front.count()
	at := m.mount("victim:1")
	harness.Output(t, m.Ctr("content", "fetch", "--plain-http", m.ref("evil:forged")))
	digest := layersOf(evil)[0]["digest"].(string)
	if r := m.ask("GET", m.lazyPath("evil", digest), "0-1"); r.status != 404 {
		t.Errorf("while the forged manifest is there, a mount gets %d", r.status)
	}
	if r := m.ask("GET", m.lazyPath("evil", digest), "100-200"); r.status != 206 {
		t.Errorf("a container that reads gets %d %s", r.status, r.body)
	}
	if b, err := os.ReadFile(at + "/file"); err != nil || string(b) != "of the victim" {
		t.Errorf("the victim's image has %q %v", b, err)
	}
	m.remove("evil:forged")
	if r := m.ask("GET", m.lazyPath("evil", digest), "0-1"); r.status != 206 {
		t.Errorf("once it is removed, a mount gets %d %s", r.status, r.body)
	}
}

package lazy

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/processor"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
	"github.com/ctrlplane/pilot/processor/ocicryptclient/grpcdial"
)

// seal puts a seal of a diff ID on a layer, and of a table of contents unless toc is empty,
// as somebody can who may unwrap its key.
func (m *machine) seal(l harness.Object, diffID, toc string) {
	m.t.Helper()
	b, err := json.Marshal(l)
	if err != nil {
		m.t.Fatal(err)
	}
	var desc ocispec.Descriptor
	if err := json.Unmarshal(b, &desc); err != nil {
		m.t.Fatal(err)
	}
	providers, err := ocicryptclient.FromFile(m.OciConf, grpcdial.Call)
	if err != nil {
		m.t.Fatal(err)
	}
	key, err := processor.Unwrap(context.Background(), processor.Keys{Providers: providers}, desc)
	if err != nil {
		m.t.Fatal(err)
	}
	var seal map[string]any
	d := json.NewDecoder(strings.NewReader(desc.Annotations[lazyAnnotation]))
	d.UseNumber()
	if err := d.Decode(&seal); err != nil {
		m.t.Fatal(err)
	}
	seal["diffID"] = diffID
	if toc != "" {
		seal["toc"], annotations(l)[tocAnnotation] = toc, toc
	}
	mac := hmac.New(sha256.New, key.Derive("pilot image lazy layer"))
	fmt.Fprintf(mac, "%s %d %s %s %s %s", key.Digest, desc.Size, diffID, seal["toc"], seal["tailOffset"], seal["tail"])
	seal["seal"] = base64.StdEncoding.EncodeToString(mac.Sum(nil))
	text, err := json.Marshal(seal)
	if err != nil {
		m.t.Fatal(err)
	}
	annotations(l)[lazyAnnotation] = string(text)
}

// sealAs pushes an image again, under another name, with its layers sealed as those of other diff
// IDs, and returns its manifest.
func (m *machine) sealAs(image, name string, diffIDs ...any) (manifest harness.Object) {
	m.t.Helper()
	original := m.manifest(image)
	manifest = clone(m.t, original)
	for i, l := range layersOf(manifest) {
		m.seal(l, diffIDs[i].(string), "")
	}
	manifest["config"] = m.withDiffIDs("evil", original, diffIDs...)
	m.push(name, manifest)
	return manifest
}

// mustNotMount checks that an image is not mounted from the snapshots of an attacker's.
func (m *machine) mustNotMount(name string) {
	m.t.Helper()
	if at, err := m.tryMount(name); err == nil {
		b, err := os.ReadFile(at + "/file")
		m.t.Errorf("%s is mounted from the attacker's snapshots: %q %v", name, b, err)
	}
}

// TestFalseSealIsFoundBeforeASnapshotIsShared has somebody who may use a KEK of the node seal
// that their layer is that of another image, encrypted or plain.
func TestFalseSealIsFoundBeforeASnapshotIsShared(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	// forge has the layers of evil sealed as those of victim, and mounts them before victim
	// comes to the node, which has the snapshots then.
	forge := func(victim, evil, forged string) (ids []any, manifest harness.Object) {
		t.Helper()
		_, ids = m.configOf(m.manifest(victim))
		manifest = m.sealAs(evil, forged, ids...)

		// Nothing says that it is false yet, and its own image has what its maker wants.
		m.pull(forged)
		if reasons := m.fullPulls(); len(reasons) > 0 {
			t.Fatalf("%s is not lazy: %v", forged, reasons)
		}
		at := m.mount(forged)
		if b, err := os.ReadFile(at + "/file"); err != nil || string(b) != "of the attacker" {
			t.Fatalf("%q %v", b, err)
		}
		m.unmount(at)
		return ids, manifest
	}
	refused := func(victim string) {
		t.Helper()
		m.pull(victim)
		m.mustNotMount(victim)
	}
	// The snapshotter has all of the small layers once their file is read.
	m.encrypt("victim:small", layer{"file": []byte("of the victim's small image")})
	m.encrypt("evil:small", layer{"file": []byte("of the attacker")})
	m.encrypt("victim:1", layer{"file": []byte("of the victim")}, layer{"big": random(1, mib)})
	m.encrypt("evil:1", layer{"file": []byte("of the attacker"), "more": nil}, layer{"big": random(2, mib)})
	forge("victim:small", "evil:small", "evil:forged-small")
	ids, forged := forge("victim:1", "evil:1", "evil:forged")
	refused("victim:small")
	refused("victim:1")
	victim, evil := m.manifest("victim:1"), m.manifest("evil:1")
	log := harness.Read(t, m.Pilot.Log)
	if !strings.Contains(log, "is not what it was sealed to be") || !strings.Contains(log, layersOf(evil)[0]["digest"].(string)) {
		t.Errorf("the log does not say so:\n%s", log)
	}
	if n := m.metrics()[`pilot_lazy_layers_read_whole_total{result="FailedPrecondition"}`]; n == 0 {
		t.Error("nor do the metrics")
	}
	m.remove("evil:forged-small")
	m.remove("victim:small")
	// The other way around, the layer is pulled in full, and containerd finds it.
	m.remove("evil:forged")
	m.remove("victim:1")
	m.pull("victim:1")
	m.remove("victim:1")
	m.pull("victim:1")
	harness.Output(t, m.Ctr("content", "fetch", "--plain-http", m.ref("evil:forged")))
	d := layersOf(evil)[0]["digest"].(string)
	if r := m.ask("GET", m.lazyPath("evil", d), "0-1"); r.status != 404 || !strings.Contains(r.body, "another image") {
		t.Errorf("a mount of the forged layer: %d %s", r.status, r.body)
	}
	// The victim's own layers are read as a whole, once, and found to be right.
	at := m.mount("victim:1")
	if b, err := os.ReadFile(at + "/file"); err != nil || string(b) != "of the victim" {
		t.Errorf("the victim's image has %q %v", b, err)
	}
	if n := m.metrics()[`pilot_lazy_layers_read_whole_total{result="OK"}`]; n != 2 {
		t.Errorf("%g of the victim's layers were read as a whole, not 2", n)
	}

	// They can also seal that it has the victim's table of contents, and that is found where
	// no other image has the layer, too.
	m.remove("evil:forged")
	m.remove("victim:1")
	for i, l := range layersOf(forged) {
		m.seal(l, ids[i].(string), annotations(layersOf(victim)[i])[tocAnnotation].(string))
	}
	m.push("evil:toc", forged)
	harness.Output(t, m.Ctr("content", "fetch", "--plain-http", m.ref("evil:toc")))
	if r := m.ask("GET", m.lazyPath("evil", d), "0-1"); r.status != 404 || !strings.Contains(r.body, "table of contents has the digest") {
		t.Errorf("a mount of the layer with the victim's table of contents: %d %s", r.status, r.body)
	}

	// Or they seal other files of the victim's blob.
	m.encrypt("same:1", layer{"file": []byte("of the same blob")})
	same := m.manifest("same:1")
	_, ids = m.configOf(same)
	m.seal(layersOf(same)[0], ids[0].(string), annotations(layersOf(victim)[0])[tocAnnotation].(string))
	m.push("same:forged", same)
	harness.Output(t, m.Ctr("content", "fetch", "--plain-http", m.ref("same:forged")))
	wholes := m.metrics()[`pilot_lazy_layers_read_whole_total{result="OK"}`]
	m.pull("same:1")
	at = m.mount("same:1")
	if b, err := os.ReadFile(at + "/file"); err != nil || string(b) != "of the same blob" {
		t.Errorf("the image has %q %v", b, err)
	}
	if n := m.metrics()[`pilot_lazy_layers_read_whole_total{result="OK"}`]; n != wholes+1 {
		t.Errorf("%g layers were read as a whole, not 1: another image says that the blob has other files", n-wholes)
	}

	// Or that it is called as all layers of an image together are.
	m.encrypt("victim:chain", layer{"file": []byte("of the victim's layers")}, layer{"more": []byte("of them")})
	_, ids = m.configOf(m.manifest("victim:chain"))
	chain := identity.ChainID([]digest.Digest{digest.Digest(ids[0].(string)), digest.Digest(ids[1].(string))}).String()
	m.encrypt("evil:one", layer{"file": []byte("of the attacker alone")})
	m.sealAs("evil:one", "evil:chain", chain)
	m.pull("evil:chain")
	if at, err := m.tryMount("evil:chain"); err != nil {
		t.Errorf("the test shows nothing, as the attacker's image is not mounted: %v", err)
	} else {
		m.unmount(at)
	}
	refused("victim:chain")
}

// occupy has the layer of evil:forged, an attacker's, mounted as that of victim:1, which is not
// pulled. Another image, evil:holder, keeps the snapshot.
func (m *machine) occupy() {
	m.t.Helper()
	m.encrypt("victim:1", layer{"file": []byte("of the victim")})
	m.encrypt("evil:1", layer{"file": []byte("of the attacker")})
	_, ids := m.configOf(m.manifest("victim:1"))
	forged := m.sealAs("evil:1", "evil:forged", ids...)
	m.pull("evil:forged")
	// Its layer is never fetched.
	holder := clone(m.t, forged)
	holder["layers"] = []any{m.pushBlob("evil", "application/vnd.oci.image.layer.v1.tar", []byte("no layer"))}
	m.push("evil:holder", holder)
	m.pull("evil:holder")
}

// TestSnapshotOfARemovedImageIsNotAnothers has an attacker's blob mounted as the victim's layer,
// by an image that is removed while another keeps the snapshot. An honest image has the blob
// then.
func TestSnapshotOfARemovedImageIsNotAnothers(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.occupy()
	m.remove("evil:forged")
	m.pull("evil:1")
	m.pull("victim:1")
	m.mustNotMount("victim:1")
	// What the image said of it may be kept by now.
	if log := harness.Read(t, m.Pilot.Log); !strings.Contains(log, "no other has it there") && !strings.Contains(log, "is not what it was sealed to be") {
		t.Errorf("the log does not say so:\n%s", log)
	}
	at := m.mount("evil:1")
	if b, err := os.ReadFile(at + "/file"); err != nil || string(b) != "of the attacker" {
		t.Errorf("the honest image: %q %v", b, err)
	}
}

// TestImageCanNotMarkSnapshots has a plain image whose annotation is the label of snapshots that
// are mounted lazily.
func TestImageCanNotMarkSnapshots(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.encrypt("app:1", layer{"file": []byte("of the image")})
	harness.Output(t, m.ctrPilot("images", "decrypt", "--plain-http", "docker://"+m.ref("app:1"), "docker://"+m.ref("app:plain")))
	plain := m.manifest("app:plain")
	layersOf(plain)[0]["annotations"] = map[string]any{"containerd.io/snapshot/remote": "x"}
	m.push("app:marked", plain)
	m.pull("app:marked")
	at := m.mount("app:marked")
	if b, err := os.ReadFile(at + "/file"); err != nil || string(b) != "of the image" {
		t.Errorf("%q %v", b, err)
	}
}

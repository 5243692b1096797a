package lazy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/processor"
)

// descriptor returns the descriptor of a layer of a manifest.
func descriptor(t testing.TB, l harness.Object) (desc ocispec.Descriptor) {
	t.Helper()
	b, err := json.Marshal(l)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &desc); err != nil {
		t.Fatal(err)
	}
	return desc
}

// ruled is a machine whose images have to be encrypted for team-a.
type ruled struct {
	*machine
	client *harness.PilotClient
	keys   processor.Keys
}

func newRuled(t testing.TB) *ruled {
	t.Helper()
	rules := harness.Write(t, filepath.Join(harness.TempDir(t), "pilot.toml"), "[[must-be-encrypted]]\nimages = ['**']\nkeks = ['team-a']\n")
	m := newMachine(t, "--config", rules)
	return &ruled{m, harness.NewPilotClient(t, m.Dir), harness.Providers(t, m.OciConf)}
}

// refused checks why the rule refuses an image, or that it does not if want is "". What pilot
// can't find out within a second it says later.
func (m *ruled) refused(name, want string) {
	m.t.Helper()
	harness.Await(m.t, name, func() error {
		if got := m.client.ImageKeys(m.t, "default", m.ref(name)).Refused; want == "" && got != "" || !strings.Contains(got, want) {
			return fmt.Errorf("it is refused because of %q, want %q", got, want)
		}
		return nil
	})
}

// lazily pulls an image lazily, whose file has that content.
func (m *ruled) lazily(name, file string) {
	m.t.Helper()
	before := m.fullPulls()
	m.pull(name)
	if reasons := m.fullPulls(); !maps.Equal(reasons, before) {
		m.t.Fatalf("%s is not lazy: %v", name, reasons)
	}
	at := m.mount(name)
	if b, err := os.ReadFile(at + "/file"); err != nil || string(b) != file {
		m.t.Fatalf("%s: %q %v", name, b, err)
	}
	m.unmount(at)
}

// forge returns the manifest of an image of the attacker's, whose layer is encrypted under
// the key of app's, and sealed with it, and that layer's ciphertext.
func (m *ruled) forge(app harness.Object, file []byte) (forged harness.Object, ciphertext []byte) {
	m.t.Helper()
	m.encrypt("evil:1", layer{"file": file})
	forged = m.manifest("evil:1")
	l := layersOf(forged)[0]
	key, err := processor.Unwrap(m.t.Context(), m.keys, descriptor(m.t, l))
	if err != nil {
		m.t.Fatal(err)
	}
	stream, err := key.KeyStream(0)
	if err != nil {
		m.t.Fatal(err)
	}
	plain := m.blob(l["digest"].(string))
	stream.XORKeyStream(plain, plain)
	ciphertext, added, _ := harness.EncryptUnder(m.t, m.keys, annotations(layersOf(app)[0])[harness.KeyAnnotation].(string), plain)
	for name, value := range added {
		annotations(l)[name] = value
	}
	l["digest"] = m.pushBlob("app", "", ciphertext)["digest"]
	config, ids := m.configOf(forged)
	forged["config"] = m.pushBlob("app", "application/vnd.oci.image.config.v1+json", mustJSON(m.t, config))
	m.seal(l, ids[0].(string), "")
	return forged, ciphertext
}

// TestSealUnderAnotherLayersKeyIsRefused has somebody who may decrypt a lazy image encrypt
// and seal another under its key, and an image of a version that did not wrap what it sealed.
func TestSealUnderAnotherLayersKeyIsRefused(t *testing.T) {
	t.Parallel()
	m := newRuled(t)
	m.encrypt("app:1", layer{"file": []byte("of the team")})
	m.lazily("app:1", "of the team")
	m.refused("app:1", "")

	forged, _ := m.forge(m.manifest("app:1"), []byte("of the attacker"))
	m.push("app:forged", forged)
	m.lazily("app:forged", "of the attacker")
	m.refused("app:forged", "is mounted lazily, and what is sealed of it is not wrapped with its key")
	harness.Output(t, m.Ctr("content", "fetch", "--plain-http", m.ref("app:forged")))
	m.refused("app:forged", `is encrypted for KEK "team-a", but what is wrapped with it is not the digest of this layer`)
	m.refused("app:1", "")

	// An earlier version's.
	m.encrypt("old:1", layer{"file": []byte("of an earlier version")})
	old := m.manifest("old:1")
	l := layersOf(old)[0]
	key, err := processor.Unwrap(t.Context(), m.keys, descriptor(t, l))
	if err != nil {
		t.Fatal(err)
	}
	again, err := key.WithSealed(nil).Wrap(t.Context(), processor.Recipients{Keys: m.keys, Parameters: map[string][][]byte{"pilot": {[]byte("team-a")}}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	annotations(l)[harness.KeyAnnotation] = again[harness.KeyAnnotation]
	m.push("old:1", old)
	m.lazily("old:1", "of an earlier version")
	m.refused("old:1", "encrypt the plain image again with ctr-pilot, since earlier versions did not wrap it")
	harness.Output(t, m.Ctr("content", "fetch", "--plain-http", m.ref("old:1")))
	m.refused("old:1", "")
}

// TestOtherSealOfAVouchedLayerIsRefused has a registry that sends other bytes where ranges of
// the team's layer are asked for, and an image of that layer whose seal says so: nobody has
// wrapped that seal, though somebody has wrapped the digest of the layer.
func TestOtherSealOfAVouchedLayerIsRefused(t *testing.T) {
	t.Parallel()
	m := newRuled(t)
	m.encrypt("app:1", layer{"file": random(1, 1000)})
	app := m.manifest("app:1")
	genuine := layersOf(app)[0]
	var file, ciphertext []byte
	var forged harness.Object
	for seed := uint32(2); len(ciphertext) != int(genuine["size"].(float64)); seed++ { // as that is in the seal
		file = random(seed, 1000)
		forged, ciphertext = m.forge(app, file)
	}
	l, digest := layersOf(forged)[0], genuine["digest"].(string)
	l["digest"], forged["config"] = digest, app["config"]
	annotations(l)[harness.PublicAnnotation] = annotations(genuine)[harness.PublicAnnotation]
	_, ids := m.configOf(app)
	m.seal(l, ids[0].(string), "")
	m.push("app:forged", forged)
	lies := func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
		if strings.HasSuffix(r.URL.Path, digest) && r.Header.Get("Range") != "" {
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(ciphertext))
			return
		}
		forward.ServeHTTP(w, r)
	}

	m.front.set(lies)
	m.lazily("app:forged", string(file))
	m.refused("app:forged", "is mounted lazily, and what is sealed of it is not wrapped with its key")
	// The blob is the team's, and shows that the seal is not true.
	harness.Output(t, m.Ctr("content", "fetch", "--plain-http", m.ref("app:forged")))
	m.refused("app:forged", "the layer is not what its key has sealed")

	// Something still uses the snapshot of the image when that is gone, and the team's comes.
	at := m.mount("app:forged")
	m.remove("app:forged")
	m.front.set(nil)
	m.pull("app:1")
	m.mustNotMount("app:1")
	// What the image said of it may be kept by now.
	if log := harness.Read(t, m.Pilot.Log); !strings.Contains(log, "of an image that was removed") && !strings.Contains(log, "is not what it was sealed to be") {
		t.Errorf("the log does not say so:\n%s", log)
	}
	m.unmount(at)
	m.remove("app:1")

	// What is known of the team's layer is not known of the seal.
	m.lazily("app:1", string(random(1, 1000)))
	m.refused("app:1", "")
	m.remove("app:1")
	m.front.set(lies)
	m.pull("app:forged")
	if at, err := m.tryMount("app:forged"); err == nil {
		if b, err := os.ReadFile(at + "/file"); err == nil && bytes.Equal(b, file) {
			t.Error("it is mounted with the attacker's files, and counts as the team's")
		}
	}
}

// TestTextOfAChainIDIsNoLayer has a blob with the text whose digest is the name of the snapshot
// of all of a victim's layers.
func TestTextOfAChainIDIsNoLayer(t *testing.T) {
	t.Parallel()
	m := newRuled(t)
	m.encrypt("victim:1", layer{"file": []byte("of the victim")}, layer{"more": nil})
	_, ids := m.configOf(m.manifest("victim:1"))
	text := ids[0].(string) + " " + ids[1].(string)
	chain := "sha256:" + harness.SHA256(text)

	m.encrypt("evil:1", layer{"base": nil}, layer{"file": []byte("of the attacker")})
	_, own := m.configOf(m.manifest("evil:1"))
	forged := m.sealAs("evil:1", "evil:forged", own[0], chain)
	base, top := layersOf(forged)[0], layersOf(forged)[1]
	m.pull("evil:forged")

	blob := m.pushBlob("evil", "application/vnd.oci.image.layer.v1.tar", []byte(text))
	fetched := maps.Clone(blob) // as what is no layer
	fetched["mediaType"] = "application/octet-stream"
	blob["annotations"] = harness.Object{tocAnnotation: annotations(top)[tocAnnotation]}
	forged["layers"] = []any{base, blob, fetched}
	m.push("evil:text", forged)
	m.pull("evil:text")
	harness.Await(t, "the text to be read", func() error { // it is read beside the request
		for _, l := range m.client.ImageKeys(t, "default", m.ref("evil:text")).Layers {
			if l.DiffID == chain {
				return errors.New(l.Why)
			}
		}
		return nil
	})

	m.pull("victim:1")
	forged["config"] = m.withDiffIDs("evil", m.manifest("evil:1"), chain)
	forged["layers"] = []any{blob}
	m.push("evil:whole", forged)
	m.pull("evil:whole")
	if err := m.client.ImageKeysError(t, "default", m.ref("evil:whole")); !strings.Contains(err, "it is the chain ID of other layers") {
		t.Errorf("the layers of another image need no key: %q", err)
	}
}

// TestRuleIsNotMetByAnotherBlobsSnapshot has the team's image away, the attacker's layer mounted
// under its diff ID, and a manifest whose own layer nobody ever reads.
func TestRuleIsNotMetByAnotherBlobsSnapshot(t *testing.T) {
	t.Parallel()
	m := newRuled(t)
	m.encrypt("app:1", layer{"file": []byte("of the team")})
	app := m.manifest("app:1")
	_, ids := m.configOf(app)
	m.lazily("app:1", "of the team")
	m.refused("app:1", "")
	m.remove("app:1")

	m.encrypt("evil:1", layer{"file": []byte("of the attacker")})
	l := layersOf(m.sealAs("evil:1", "evil:forged", ids...))[0]
	_ = m.pullCommand("evil:forged").Run() // if it is read as a whole, it has not the diff ID

	never := m.pushBlob("app", l["mediaType"].(string), random(3, int(l["size"].(float64))))
	never["annotations"] = l["annotations"]
	app["layers"] = []any{never}
	m.push("app:forged", app)
	_ = m.pullCommand("app:forged").Run()
	if at, err := m.tryMount("app:forged"); err == nil {
		b, err := os.ReadFile(at + "/file")
		if why := m.client.ImageKeys(t, "default", m.ref("app:forged")).Refused; why == "" {
			t.Errorf("a container has %q %v, and the rule is content", b, err)
		}
	}
}

func mustJSON(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

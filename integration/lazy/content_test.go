package lazy

import (
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

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

// TestSealUnderAnotherLayersKeyIsRefused has somebody who may decrypt a lazy image encrypt
// and seal another under its key, and an image of a version that did not wrap what it sealed.
func TestSealUnderAnotherLayersKeyIsRefused(t *testing.T) {
	t.Parallel()
	rules := harness.Write(t, filepath.Join(harness.TempDir(t), "pilot.toml"), "[[must-be-encrypted]]\nimages = ['**']\nkeks = ['team-a']\n")
	m := newMachine(t, "--config", rules)
	client := harness.NewPilotClient(t, m.Dir)
	keys := harness.Providers(t, m.OciConf)
	harness.Await(t, "pilot to find containerd", func() error {
		r, err := client.Admin.Get("http://pilot/image-keys?namespace=default&image=none")
		if err == nil {
			r.Body.Close()
			if r.StatusCode == http.StatusServiceUnavailable {
				err = errors.New(r.Status)
			}
		}
		return err
	})
	refused := func(name, want string) {
		t.Helper()
		if got := client.ImageKeys(t, "default", m.ref(name)).Refused; want == "" && got != "" || !strings.Contains(got, want) {
			t.Errorf("%s is refused because of %q, want %q", name, got, want)
		}
	}
	lazily := func(name, file string) {
		t.Helper()
		m.pull(name)
		if reasons := m.fullPulls(); len(reasons) > 0 {
			t.Fatalf("%s is not lazy: %v", name, reasons)
		}
		if b, err := os.ReadFile(m.mount(name) + "/file"); err != nil || string(b) != file {
			t.Fatalf("%s: %q %v", name, b, err)
		}
	}
	m.encrypt("app:1", layer{"file": []byte("of the team")})
	lazily("app:1", "of the team")
	refused("app:1", "")

	m.encrypt("evil:1", layer{"file": []byte("of the attacker")})
	app, forged := m.manifest("app:1"), m.manifest("evil:1")
	l := layersOf(forged)[0]
	key, err := processor.Unwrap(t.Context(), keys, descriptor(t, l))
	if err != nil {
		t.Fatal(err)
	}
	stream, err := key.KeyStream(0)
	if err != nil {
		t.Fatal(err)
	}
	plain := m.blob(l["digest"].(string))
	stream.XORKeyStream(plain, plain)
	ciphertext, added, _ := harness.EncryptUnder(t, keys, annotations(layersOf(app)[0])[harness.KeyAnnotation].(string), plain)
	for name, value := range added {
		annotations(l)[name] = value
	}
	l["digest"] = m.pushBlob("app", "", ciphertext)["digest"]
	config, ids := m.configOf(forged)
	forged["config"] = m.pushBlob("app", "application/vnd.oci.image.config.v1+json", mustJSON(t, config))
	m.seal(l, ids[0].(string), "")
	m.push("app:forged", forged)
	lazily("app:forged", "of the attacker")
	refused("app:forged", "is mounted lazily, and what is sealed of it is not wrapped with its key")
	harness.Output(t, m.Ctr("content", "fetch", "--plain-http", m.ref("app:forged")))
	refused("app:forged", `is encrypted for KEK "team-a", but what is wrapped with it is not the digest of this layer`)
	refused("app:1", "")

	// An earlier version's.
	m.encrypt("old:1", layer{"file": []byte("of an earlier version")})
	old := m.manifest("old:1")
	l = layersOf(old)[0]
	if key, err = processor.Unwrap(t.Context(), keys, descriptor(t, l)); err != nil {
		t.Fatal(err)
	}
	again, err := key.WithSealed(nil).Wrap(t.Context(), processor.Recipients{Keys: keys, Parameters: map[string][][]byte{"pilot": {[]byte("team-a")}}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	annotations(l)[harness.KeyAnnotation] = again[harness.KeyAnnotation]
	m.push("old:1", old)
	lazily("old:1", "of an earlier version")
	refused("old:1", "encrypt the plain image again with ctr-pilot, since earlier versions did not wrap it")
	harness.Output(t, m.Ctr("content", "fetch", "--plain-http", m.ref("old:1")))
	refused("old:1", "")
}

func mustJSON(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

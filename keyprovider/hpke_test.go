package keyprovider

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/ctrlplane/pilot/internal/openedby"
	"github.com/ctrlplane/pilot/internal/publickek"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// public returns the public half of a KEK's current version.
func (b *testBroker) public(t testing.TB, id string) *publickek.PublicKey {
	t.Helper()
	fipstest.Refused(t, fipstest.HPKE)
	answer, err := b.keys.Public(t.Context(), id, 0)
	if err != nil {
		t.Fatal(err)
	}
	f, err := publickek.Parse([]byte(answer.File))
	if err != nil {
		t.Fatal(err)
	}
	roots, err := certfile.Pool(filepath.Join(b.dir, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := f.Verify(roots, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return &key
}

// offline returns a provider that has public keys and no broker.
func offline(keys ...*publickek.PublicKey) *Provider {
	return New(nil, Config{PublicKey: func(id string) (*publickek.PublicKey, error) {
		for _, k := range keys {
			if k.ID == id {
				return k, nil
			}
		}
		return nil, nil
	}})
}

func TestPublicKeyWrapsWithoutABroker(t *testing.T) {
	b := startBroker(t, map[string][]byte{"a": nil, "b": nil})
	ci := offline(b.public(t, "a"), b.public(t, "b"))
	node := newProvider(t, b.url, Config{CacheSize: 10})
	annotation := wrapFor(t, ci, "a", "b")
	b.rotate(t, "a", 1)
	for range 3 {
		if err := unwraps(t, node, annotation); err != nil {
			t.Error(err)
		}
	}
	if n := b.asked(t, "a") + b.asked(t, "b"); n != 1 {
		t.Errorf("the broker was asked %d times for keys, not once", n)
	}
	if err := unwraps(t, node, annotation, "b"); err != nil {
		t.Error(err)
	}
	if err := unwraps(t, node, annotation, "c"); !errors.Is(err, ErrWrongKEK) {
		t.Errorf("with another KEK: %v", err)
	}
	if _, err := ci.WrapKey(t.Context(), named("c"), []byte(secret)); err == nil || !strings.Contains(err.Error(), "broker is not set") {
		t.Errorf("for a KEK without a file: %v", err)
	}
	if err := unwraps(t, ci, annotation); err == nil || !strings.Contains(err.Error(), "broker is not set") {
		t.Errorf("unwrapping without a broker: %v", err)
	}
}

// TestDerivedKeyIsDroppedWithItsKEK looks for the private key beside the KEK.
func TestDerivedKeyIsDroppedWithItsKEK(t *testing.T) {
	b := startBroker(t, map[string][]byte{"a": nil})
	annotation := wrapFor(t, offline(b.public(t, "a")), "a")
	p := newProvider(t, b.url, Config{CacheSize: 1})
	if err := unwraps(t, p, annotation); err != nil {
		t.Fatal(err)
	}
	e := p.keks.entries[cacheKey{"a", 1}].Value.(*cacheEntry)
	if e.private == nil {
		t.Fatal("it is not kept")
	}
	p.keks.clear()
	if e.private != nil {
		t.Error("it is kept when the KEK is not")
	}
}

// TestAnnotationOfAPublicKeyCannotBeChanged swaps what a registry could: each is an error
// of a wrong key, or of an annotation that is not one.
func TestAnnotationOfAPublicKeyCannotBeChanged(t *testing.T) {
	b := startBroker(t, map[string][]byte{"a": nil, "b": nil})
	b.rotate(t, "a", 1)
	p := newProvider(t, b.url, Config{CacheSize: 10})
	for name, test := range map[string]struct {
		change func(*wireformat.Annotation)
		want   error
	}{
		"KEK":              {func(a *wireformat.Annotation) { a.KEKID = "b"; a.KEKVersion = 1 }, ErrWrongKEK},
		"version":          {func(a *wireformat.Annotation) { a.KEKVersion = 1 }, ErrWrongKEK},
		"later version":    {func(a *wireformat.Annotation) { a.KEKVersion = 3 }, client.ErrNoVersion},
		"no version":       {func(a *wireformat.Annotation) { a.KEKVersion = 0 }, ErrInput},
		"method":           {func(a *wireformat.Annotation) { a.Method = wireformat.MethodCopilot; a.Enc = nil }, client.ErrRejected},
		"another suite":    {func(a *wireformat.Annotation) { a.Method = "HPKE-0" }, ErrInput},
		"cut":              {func(a *wireformat.Annotation) { a.Enc = a.Enc[:1119] }, ErrInput},
		"wrapped key":      {func(a *wireformat.Annotation) { a.WrappedKey[0] ^= 1 }, ErrWrongKEK},
		"encapsulated key": {func(a *wireformat.Annotation) { a.Enc[1119] ^= 1 }, ErrWrongKEK},
	} {
		var a wireformat.Annotation
		if err := json.Unmarshal(wrapFor(t, offline(b.public(t, "a")), "a"), &a); err != nil {
			t.Fatal(err)
		}
		test.change(&a)
		changed, err := json.Marshal(a)
		if err != nil {
			t.Fatal(err)
		}
		if err := unwraps(t, p, changed); !errors.Is(err, test.want) {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
	}
}

func BenchmarkWrapForPublicKey(b *testing.B) {
	p := offline(startBroker(b, map[string][]byte{"a": nil}).public(b, "a"))
	quiet(b)
	for b.Loop() {
		wrapFor(b, p, "a")
	}
}

// BenchmarkUnwrapOfPublicKey unwraps with a KEK that is cached.
func BenchmarkUnwrapOfPublicKey(b *testing.B) {
	broker := startBroker(b, map[string][]byte{"a": nil})
	annotation := wrapFor(b, offline(broker.public(b, "a")), "a")
	p := newProvider(b, broker.url, Config{CacheSize: 1})
	quiet(b)
	for b.Loop() {
		if _, err := p.UnwrapKey(b.Context(), nil, annotation); err != nil {
			b.Fatal(err)
		}
	}
}

// TestOnlyABrokersKEKIsReportedAsOpener has a recipient of age in an annotation, which is
// what its writer says, and what anybody can wrap for.
func TestOnlyABrokersKEKIsReportedAsOpener(t *testing.T) {
	fipstest.Refused(t, fipstest.Age)
	b := startBroker(t, map[string][]byte{"a": nil})
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "key.txt")
	if err := os.WriteFile(file, []byte(id.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := newProvider(t, b.url, Config{CacheSize: 1, AgeIdentities: []string{file}})
	for name, test := range map[string]struct {
		annotation []byte
		want       openedby.KEK
	}{
		"KEK":        {wrapFor(t, p, "a"), openedby.KEK{ID: "a", Version: 1, Method: wireformat.MethodA256GCMKW}},
		"public key": {wrapFor(t, offline(b.public(t, "a")), "a"), openedby.KEK{ID: "a", Version: 1, Method: wireformat.MethodHPKE}},
		"age":        {wrapFor(t, p, id.Recipient().String()), openedby.KEK{}},
	} {
		ctx, kek := openedby.With(t.Context())
		if _, err := p.UnwrapKey(ctx, nil, test.annotation); err != nil || *kek != test.want {
			t.Errorf("%s: %+v, %v; want %+v", name, *kek, err, test.want)
		}
	}
}

func TestDerivedKeyIsKeptBesideItsKEKAlone(t *testing.T) {
	fipstest.Refused(t, fipstest.HPKE)
	b := startBroker(t, map[string][]byte{"a": nil})
	for _, size := range []int{0, 1} {
		p := newProvider(t, b.url, Config{CacheSize: size})
		kek, err := p.keks.get(t.Context(), "a", 1)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if _, kept, err := p.keks.private(kek, 1); err != nil || kept != (size > 0) {
				t.Errorf("of %d KEKs that are kept: %v, %v", size, kept, err)
			}
		}
	}
}

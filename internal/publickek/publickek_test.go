package publickek

import (
	"bytes"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha3"
	"encoding/binary"
	"encoding/json"
	"flag"
	"os"
	"slices"
	"testing"

	"github.com/cloudflare/circl/hpke"

	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

const layerKey = `{"symkey":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=","digest":"sha256:54e8ef639cf38281f1788b6eb2a5fd4edb3e3ae9ee7a0ad6a77ef7ec9dbcd6ce","cipheroptions":{"nonce":"AAECAwQFBgcICQoLDA0ODw=="}}`

func newKEK() []byte {
	kek := make([]byte, wireformat.KEKSize)
	rand.Read(kek)
	return kek
}

func derive(t testing.TB, kek []byte, id string, version int) *PrivateKey {
	t.Helper()
	k, err := Derive(kek, id, version)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func wrap(t testing.TB, key PublicKey) wireformat.Annotation {
	t.Helper()
	a, err := key.Wrap([]byte(layerKey))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestUnwrapGivesWhatWasWrapped(t *testing.T) {
	fipstest.Refused(t, fipstest.HPKE)
	private := derive(t, newKEK(), "team-a", 3)
	public, err := newPublicKey(private.Public().Bytes(), "team-a", 3)
	if err != nil {
		t.Fatal(err)
	}
	a := wrap(t, public)
	if err := a.Validate(); err != nil {
		t.Error(err)
	}
	if len(a.Enc) != wireformat.EncSize || a.KEKID != "team-a" || a.KEKVersion != 3 {
		t.Errorf("%s version %d, encapsulated key of %d bytes", a.KEKID, a.KEKVersion, len(a.Enc))
	}
	private.Clear() // what is in progress goes on
	if seed, err := private.key.Bytes(); err != nil || !bytes.Equal(seed, make([]byte, 32)) {
		t.Errorf("the seed is not cleared, %v", err)
	}
	if got, err := private.Unwrap(a); err != nil || string(got) != layerKey {
		t.Errorf("%q, %v", got, err)
	}
}

// TestNothingOfAnAnnotationCanBeSwapped checks that method, KEK, version, encapsulated key
// and wrapped key belong together.
func TestNothingOfAnAnnotationCanBeSwapped(t *testing.T) {
	fipstest.Refused(t, fipstest.HPKE)
	kek := newKEK()
	other := wrap(t, derive(t, kek, "team-a", 3).Public())
	for name, change := range map[string]func(*wireformat.Annotation){
		"KEK":                   func(a *wireformat.Annotation) { a.KEKID = "team-b" },
		"version":               func(a *wireformat.Annotation) { a.KEKVersion = 2 },
		"encapsulated key":      func(a *wireformat.Annotation) { a.Enc = other.Enc },
		"bit of ML-KEM":         func(a *wireformat.Annotation) { a.Enc[0] ^= 1 },
		"bit of X25519":         func(a *wireformat.Annotation) { a.Enc[len(a.Enc)-1] ^= 1 },
		"wrapped key":           func(a *wireformat.Annotation) { a.WrappedKey = other.WrappedKey },
		"tag":                   func(a *wireformat.Annotation) { a.WrappedKey[len(a.WrappedKey)-1] ^= 1 },
		"end":                   func(a *wireformat.Annotation) { a.WrappedKey = a.WrappedKey[:len(a.WrappedKey)-1] },
		"end of the encap. key": func(a *wireformat.Annotation) { a.Enc = a.Enc[:len(a.Enc)-1] },
		"X25519 key of order 1": func(a *wireformat.Annotation) { clear(a.Enc[len(a.Enc)-32:]) },
	} {
		a := wrap(t, derive(t, kek, "team-a", 3).Public())
		change(&a)
		// As a reader has it: with the key that the annotation names, and with the right one.
		for _, k := range []*PrivateKey{derive(t, kek, a.KEKID, a.KEKVersion), derive(t, kek, "team-a", 3)} {
			if got, err := k.Unwrap(a); err != ErrNotUnwrapped {
				t.Errorf("with another %s: %q, %v", name, got, err)
			}
		}
	}
}

func TestKEKsOfOtherSizesHaveNoPublicHalf(t *testing.T) {
	fipstest.Refused(t, fipstest.HPKE)
	for _, size := range []int{0, 16, 24, 31, 33} {
		if _, err := Derive(make([]byte, size), "team-a", 1); err == nil {
			t.Errorf("a KEK of %d bytes has one", size)
		}
	}
}

// TestDerivationIsThatOfTheDocumentation derives a private key as docs/formats.md says,
// without the code above.
func TestDerivationIsThatOfTheDocumentation(t *testing.T) {
	fipstest.Refused(t, fipstest.HPKE)
	kek := newKEK()
	ikm, err := hkdf.Key(sha256.New, kek, nil, `pilot public key {"kekId":"team-a","kekVersion":3,"method":"HPKE-MLKEM768-X25519-HKDF-SHA256-A256GCM"}`, 32)
	if err != nil {
		t.Fatal(err)
	}
	// DeriveKeyPair of draft-ietf-hpke-pq: LabeledDerive with SHAKE256, then the seed.
	var in []byte
	in = append(in, ikm...)
	in = append(in, "HPKE-v1"...)
	in = append(in, "KEM\x64\x7a"...)
	in = binary.BigEndian.AppendUint16(in, uint16(len("DeriveKeyPair")))
	in = append(in, "DeriveKeyPair"...)
	in = binary.BigEndian.AppendUint16(in, 32)
	seed := sha3.SumSHAKE256(in, 32)
	got, err := derive(t, kek, "team-a", 3).key.Bytes()
	if err != nil || !bytes.Equal(got, seed) {
		t.Errorf("%x, %v, want %x", got, err, seed)
	}
}

// vector is one of testdata/hpke.jsonl.
type vector struct {
	KEK        []byte                `json:"kek"`
	Seed       []byte                `json:"seed"` // of the private key
	PublicKey  []byte                `json:"publicKey"`
	Optsdata   []byte                `json:"optsdata"`
	Annotation wireformat.Annotation `json:"annotation"`
}

var makeVectors = flag.Bool("vectors", false, "write testdata/hpke.jsonl anew")

func TestVectors(t *testing.T) {
	fipstest.Refused(t, fipstest.HPKE)
	const name = "testdata/hpke.jsonl"
	if *makeVectors {
		var text []byte
		for _, of := range []struct {
			id      string
			version int
		}{{"team-a", 1}, {"team-a", 2}, {"shop/prod.eu", 1000}, {"x", 1}} {
			kek := newKEK()
			k := derive(t, kek, of.id, of.version)
			seed, err := k.key.Bytes()
			if err != nil {
				t.Fatal(err)
			}
			b, err := json.Marshal(vector{kek, seed, k.Public().Bytes(), []byte(layerKey), wrap(t, k.Public())})
			if err != nil {
				t.Fatal(err)
			}
			text = append(append(text, b...), '\n')
		}
		if err := os.WriteFile(name, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for i, v := range readVectors(t, name) {
		k := derive(t, v.KEK, v.Annotation.KEKID, v.Annotation.KEKVersion)
		if seed, err := k.key.Bytes(); err != nil || !bytes.Equal(seed, v.Seed) || !bytes.Equal(k.Public().Bytes(), v.PublicKey) {
			t.Errorf("vector %d: another key pair, %v", i, err)
		}
		if got, err := k.Unwrap(v.Annotation); err != nil || !bytes.Equal(got, v.Optsdata) {
			t.Errorf("vector %d: %q, %v", i, got, err)
		}
	}
}

func readVectors(t testing.TB, name string) (list []vector) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(b) {
		var v vector
		if err := json.Unmarshal(line, &v); err != nil {
			t.Fatal(err)
		}
		list = append(list, v)
	}
	if len(list) != 4 {
		t.Fatalf("%d vectors", len(list))
	}
	return list
}

// TestCirclReadsWhatWasWrittenAndTheOtherWay uses Cloudflare's HPKE, which has nothing in
// common with Go's.
func TestCirclReadsWhatWasWrittenAndTheOtherWay(t *testing.T) {
	fipstest.Refused(t, fipstest.Peer)
	suite := hpke.NewSuite(hpke.KEM_XWING, hpke.KDF_HKDF_SHA256, hpke.AEAD_AES256GCM)
	scheme := hpke.KEM_XWING.Scheme()
	for i, v := range readVectors(t, "testdata/hpke.jsonl") {
		info := []byte(`{"kekId":"` + v.Annotation.KEKID + `","kekVersion":` + string(must(json.Marshal(v.Annotation.KEKVersion))) + `,"method":"` + v.Annotation.Method + `"}`)
		private, err := scheme.UnmarshalBinaryPrivateKey(v.Seed)
		if err != nil {
			t.Fatal(err)
		}
		if public, err := private.Public().MarshalBinary(); err != nil || !bytes.Equal(public, v.PublicKey) {
			t.Errorf("vector %d: another public key, %v", i, err)
		}
		receiver, err := suite.NewReceiver(private, info)
		if err != nil {
			t.Fatal(err)
		}
		opener, err := receiver.Setup(v.Annotation.Enc)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := opener.Open(v.Annotation.WrappedKey, nil); err != nil || !bytes.Equal(got, v.Optsdata) {
			t.Errorf("vector %d: circl unwraps %q, %v", i, got, err)
		}

		public, err := scheme.UnmarshalBinaryPublicKey(v.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		sender, err := suite.NewSender(public, info)
		if err != nil {
			t.Fatal(err)
		}
		enc, sealer, err := sender.Setup(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		a := v.Annotation
		a.Enc = enc
		if a.WrappedKey, err = sealer.Seal(v.Optsdata, nil); err != nil {
			t.Fatal(err)
		}
		if got, err := derive(t, v.KEK, a.KEKID, a.KEKVersion).Unwrap(a); err != nil || !bytes.Equal(got, v.Optsdata) {
			t.Errorf("vector %d: what circl wrapped unwraps to %q, %v", i, got, err)
		}
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// FuzzUnwrap unwraps what an attacker may have written.
func FuzzUnwrap(f *testing.F) {
	fipstest.Refused(f, fipstest.HPKE)
	v := readVectors(f, "testdata/hpke.jsonl")[0] // the same in all processes
	a, private := v.Annotation, derive(f, v.KEK, "team-a", 1)
	f.Add(a.Enc, a.WrappedKey)
	f.Add(a.Enc[:32], a.WrappedKey[:16])
	f.Add([]byte{}, []byte{})
	good := slices.Concat(a.Enc, a.WrappedKey)
	f.Fuzz(func(t *testing.T, enc, wrapped []byte) {
		got, err := private.Unwrap(wireformat.Annotation{Method: wireformat.MethodHPKE, KEKID: "team-a", KEKVersion: 1, Enc: enc, WrappedKey: wrapped})
		if err == nil && !bytes.Equal(slices.Concat(enc, wrapped), good) {
			t.Errorf("it unwraps to %q", got)
		}
	})
}

func BenchmarkWrap(b *testing.B) {
	public := derive(b, newKEK(), "team-a", 1).Public()
	for b.Loop() {
		wrap(b, public)
	}
}

func BenchmarkUnwrap(b *testing.B) {
	private := derive(b, newKEK(), "team-a", 1)
	a := wrap(b, private.Public())
	for b.Loop() {
		if _, err := private.Unwrap(a); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDeriveAndUnwrap(b *testing.B) {
	kek := newKEK()
	a := wrap(b, derive(b, kek, "team-a", 1).Public())
	for b.Loop() {
		if _, err := derive(b, kek, "team-a", 1).Unwrap(a); err != nil {
			b.Fatal(err)
		}
	}
}

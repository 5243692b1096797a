package agekey

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

func TestMain(m *testing.M) {
	IsolatePlugins()
	os.Exit(m.Run())
}

const layerKey = `{"symkey":"AAECAw==","digest":"sha256:54","cipheroptions":{"nonce":"AAE="}}`

// newX25519 and newHybrid return a recipient and its identity.
func newX25519(t testing.TB) (to, identity string) {
	t.Helper()
	fipstest.Refused(t, fipstest.Age)
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return id.Recipient().String(), id.String()
}

func newHybrid(t testing.TB) (to, identity string) {
	t.Helper()
	fipstest.Refused(t, fipstest.Age)
	id, err := age.GenerateHybridIdentity()
	if err != nil {
		t.Fatal(err)
	}
	return id.Recipient().String(), id.String()
}

// write writes a file of identities.
func write(t testing.TB, lines ...string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "key.txt")
	if err := os.WriteFile(name, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func wrap(t testing.TB, to string) []byte {
	t.Helper()
	wrapped, err := Wrap(t.Context(), to, []byte(layerKey))
	if err != nil {
		t.Fatal(err)
	}
	return wrapped
}

func TestUnwrapGivesWhatWasWrapped(t *testing.T) {
	for name, generate := range map[string]func(testing.TB) (string, string){"X25519": newX25519, "post-quantum": newHybrid} {
		to, identity := generate(t)
		_, other := generate(t)
		wrapped := wrap(t, to)
		file := write(t, "# created: 2026-11-29", "# public key: "+to, "# "+strings.Repeat("long", 1<<15), "", other, identity)
		got, err := Read([]string{filepath.Join(t.TempDir(), "missing"), file}).Unwrap(wrapped)
		if err != nil || string(got) != layerKey {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		if got, err := Read([]string{write(t, other)}).Unwrap(wrapped); !errors.Is(err, ErrNotUnwrapped) {
			t.Errorf("%s: another identity: %q, %v", name, got, err)
		}
		for what, changed := range map[string][]byte{
			"cut":     wrapped[:len(wrapped)-1],
			"half":    wrapped[:len(wrapped)/2],
			"longer":  append(bytes.Clone(wrapped), 0),
			"changed": append(bytes.Clone(wrapped[:len(wrapped)-1]), wrapped[len(wrapped)-1]^1),
			"empty":   {},
		} {
			if got, err := Read([]string{file}).Unwrap(changed); !errors.Is(err, ErrNotUnwrapped) {
				t.Errorf("%s, %s: %q, %v", name, what, got, err)
			}
		}
	}
}

func TestRecipientTypedWrongIsNamed(t *testing.T) {
	fipstest.Refused(t, fipstest.Age)
	good, _ := newX25519(t)
	pq, _ := newHybrid(t)
	for _, to := range []string{
		"age1", "age1team-a", good[:len(good)-1], good[:20] + "b" + good[21:], strings.ToUpper(good), "Age1" + good[4:],
		pq[:200], "age1pq1" + good[5:], "age1xyz1qqqq", "age1../../bin/sh1qqqq", "age1tag1" + good[5:],
	} {
		if _, err := Wrap(t.Context(), to, []byte(layerKey)); !errors.Is(err, ErrRecipient) || strings.Contains(err.Error(), "%!") {
			t.Errorf("%.40s: %v", to, err)
		}
	}
}

func TestIdentityFileThatCannotBeUsedIsNamed(t *testing.T) {
	fipstest.Refused(t, fipstest.Age)
	to, identity := newX25519(t)
	wrapped := wrap(t, to)
	for name, test := range map[string]struct{ text, want string }{
		"a recipient":        {to, ":1: it is a recipient"},
		"damaged":            {identity[:len(identity)-1], ":1: it is not an identity of age"},
		"damaged plugin's":   {"AGE-PLUGIN-X-1QQ", ":1: it is not an identity of age"},
		"no identity":        {"# nothing", "has no identity"},
		"with a passphrase":  {"age-encryption.org/v1\n-> scrypt", "is encrypted"},
		"with one, in ASCII": {"-----BEGIN AGE ENCRYPTED FILE-----", "is encrypted"},
	} {
		_, err := Read([]string{write(t, test.text)}).Unwrap(wrapped)
		if !errors.Is(err, ErrNotUnwrapped) || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), identity[:30]) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
	}
}

// vector is one of testdata/age.jsonl.
type vector struct {
	By        string `json:"by"` // which program wrote it
	Identity  string `json:"identity"`
	Recipient string `json:"recipient"`
	Optsdata  []byte `json:"optsdata"`
	Wrapped   []byte `json:"wrappedKey"`
}

var makeVectors = flag.Bool("vectors", false, "write our lines of testdata/age.jsonl anew")

func TestVectors(t *testing.T) {
	fipstest.Refused(t, fipstest.Age)
	const name = "testdata/age.jsonl"
	if *makeVectors {
		var text []byte
		for _, generate := range []func(testing.TB) (string, string){newX25519, newHybrid} {
			to, identity := generate(t)
			b, err := json.Marshal(vector{"pilot", identity, to, []byte(layerKey), wrap(t, to)})
			if err != nil {
				t.Fatal(err)
			}
			text = append(append(text, b...), '\n')
		}
		if err := os.WriteFile(name, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range bytes.Lines(b) {
		var v vector
		if err := json.Unmarshal(line, &v); err != nil {
			t.Fatal(err)
		}
		if got, err := Read([]string{write(t, v.Identity)}).Unwrap(v.Wrapped); err != nil || !bytes.Equal(got, v.Optsdata) {
			t.Errorf("vector %d, by %s: %q, %v", n, v.By, got, err)
		}
		n++
	}
	if n != 5 {
		t.Errorf("%d vectors, not 5", n)
	}
}

// FuzzUnwrap decrypts what an attacker may have written.
func FuzzUnwrap(f *testing.F) {
	fipstest.Refused(f, fipstest.Age)
	to, identity := newX25519(f)
	pq, pqIdentity := newHybrid(f)
	ids := Read([]string{write(f, identity, pqIdentity)})
	f.Add(wrap(f, to))
	f.Add(wrap(f, pq))
	f.Add([]byte("age-encryption.org/v1\n-> X25519 x\n\n---"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if got, err := ids.Unwrap(b); err == nil && string(got) != layerKey {
			t.Errorf("it unwraps to %q", got)
		}
	})
}

// FuzzRecipient parses what somebody may have typed.
func FuzzRecipient(f *testing.F) {
	fipstest.Refused(f, fipstest.Age)
	to, identity := newX25519(f)
	for _, text := range []string{to, identity, "age1pq1", "age1tag1", "age1x1", "AGE1", "team-a"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if err := Check(text); err == nil && !strings.HasPrefix(text, "age1") {
			t.Errorf("%q is taken for a recipient", text)
		}
	})
}

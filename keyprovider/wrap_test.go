package keyprovider

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// TestOriginalVectors unwraps what a JVM wrapped, with the original's code.
func TestOriginalVectors(t *testing.T) {
	fipstest.Refused(t, fipstest.Original)
	f, err := os.Open("testdata/aes-gcm-annotations.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n := 0
	for lines := bufio.NewScanner(f); lines.Scan(); n++ {
		var v struct{ KEK, Optsdata, Annotation []byte }
		if err := json.Unmarshal(lines.Bytes(), &v); err != nil {
			t.Fatal(err)
		}
		list, err := wireformat.ParseAnnotation(v.Annotation)
		if err != nil {
			t.Fatal(err)
		}
		got, err := unwrap(client.KEK{Key: v.KEK}, list[0])
		if err != nil || !bytes.Equal(got, v.Optsdata) {
			t.Errorf("vector %d: got %q, %v", n, got, err)
		}
	}
	if n != 4 {
		t.Errorf("%d vectors were read, not 4", n)
	}
}

func TestWrapUnwrap(t *testing.T) {
	fipstest.Refused(t, fipstest.Original)
	secret := []byte(`{"symkey":"…"}`)
	for _, test := range []struct {
		format Format
		size   int
		ok     bool
	}{
		{FormatA256GCMKW, 32, true}, {FormatA256GCMKW, 16, false}, {FormatA256GCMKW, 24, false}, {FormatA256GCMKW, 0, false},
		{FormatOriginal, 16, true}, {FormatOriginal, 24, true}, {FormatOriginal, 32, true}, {FormatOriginal, 31, false},
	} {
		kek := client.KEK{ID: "team-a", Version: 3, Key: bytes.Repeat([]byte{7}, test.size)}
		a, err := wrap(kek, test.format, secret)
		if (err == nil) != test.ok {
			t.Errorf("%s with %d bytes: %v", test.format, test.size, err)
		}
		if err != nil {
			if !strings.Contains(err.Error(), "team-a") {
				t.Errorf("the error does not name the KEK: %v", err)
			}
			continue
		}
		b, err := json.Marshal(a)
		if err != nil {
			t.Fatal(err)
		}
		list, err := wireformat.ParseAnnotation(b)
		if err != nil {
			t.Fatalf("%s: %v", b, err)
		}
		if got, err := unwrap(kek, list[0]); err != nil || !bytes.Equal(got, secret) {
			t.Errorf("%s: %q, %v", b, got, err)
		}
	}
}

// TestOriginalFields checks that the original, which refuses unknown fields,
// gets no others than its own.
func TestOriginalFields(t *testing.T) {
	fipstest.Refused(t, fipstest.Original)
	a, err := wrap(client.KEK{ID: "team-a", Version: 2, Key: make([]byte, 32)}, FormatOriginal, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	var fields map[string]string
	if err := json.Unmarshal(b, &fields); err != nil {
		t.Fatal(err)
	}
	iv, err := base64.StdEncoding.DecodeString(fields["iv"])
	if len(fields) != 3 || fields["method"] != "AES-GCM" || err != nil || len(iv) != 16 || fields["wrappedKey"] == "" {
		t.Errorf("annotation %s", b)
	}
}

// TestBound checks that nothing that an annotation says can be changed.
func TestBound(t *testing.T) {
	kek := client.KEK{ID: "team-a", Version: 3, Key: make([]byte, 32)}
	for name, change := range map[string]func(*wireformat.Annotation){
		"KEK":         func(a *wireformat.Annotation) { a.KEKID = "team-b" },
		"version":     func(a *wireformat.Annotation) { a.KEKVersion = 2 },
		"no version":  func(a *wireformat.Annotation) { a.KEKVersion = 0 },
		"method":      func(a *wireformat.Annotation) { a.Method = wireformat.MethodAESGCM },
		"IV":          func(a *wireformat.Annotation) { a.IV[0] ^= 1 },
		"wrapped key": func(a *wireformat.Annotation) { a.WrappedKey[0] ^= 1 },
		"tag":         func(a *wireformat.Annotation) { a.WrappedKey[len(a.WrappedKey)-1] ^= 1 },
		"cut":         func(a *wireformat.Annotation) { a.WrappedKey = a.WrappedKey[:len(a.WrappedKey)-1] },
	} {
		a, err := wrap(kek, FormatA256GCMKW, []byte("secret"))
		if err != nil {
			t.Fatal(err)
		}
		change(&a)
		if got, err := unwrap(kek, a); err == nil {
			t.Errorf("with another %s it unwraps to %q", name, got)
		}
	}
}

func FuzzParseAnnotation(f *testing.F) {
	f.Add([]byte(`{"method":"A256GCMKW","kekId":"a","kekVersion":1,"iv":"AAAAAAAAAAAAAAAA","wrappedKey":"AAAAAAAAAAAAAAAAAAAAAAAAAAA="}`))
	f.Add([]byte(`[{"method":"AES-GCM","iv":"AAAAAAAAAAAAAAAAAAAAAA==","wrappedKey":"AAAAAAAAAAAAAAAAAAAAAAAAAAA="}]`))
	f.Add([]byte(`{"method":"copilot","kekId":"a","kekVersion":1,"wrappedKey":"AAAA"}`))
	f.Add([]byte(`{"method":"age","recipient":"age1x","wrappedKey":"AAAA"}`))
	f.Add([]byte(`{"method":"HPKE-MLKEM768-X25519-HKDF-SHA256-A256GCM","kekId":"a","kekVersion":1,"enc":"` + strings.Repeat("AAAA", 373) + `AA==","wrappedKey":"AAAAAAAAAAAAAAAAAAAAAAAAAAA="}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := wireformat.ParseAnnotation(b)
		if err != nil {
			return
		}
		for _, a := range list {
			if a.Method == wireformat.MethodHPKE || a.Method == wireformat.MethodAge {
				continue // packages publickek and agekey
			}
			if _, err := unwrap(client.KEK{Key: make([]byte, 32)}, a); err == nil {
				t.Fatalf("%s unwraps with a KEK of zeros", b)
			}
		}
		again, err := json.Marshal(list)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := wireformat.ParseAnnotation(again); err != nil {
			t.Fatalf("%s was accepted, %s is not: %v", b, again, err)
		}
	})
}

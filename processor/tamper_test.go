package processor

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/containers/ocicrypt/utils"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// TestTamperedAnywhere changes each bit of a small layer, cuts it at each length,
// and moves what is in large ones.
func TestTamperedAnywhere(t *testing.T) {
	check := func(what string, k *LayerKey, changed []byte) {
		t.Helper()
		d, err := NewDecrypter(bytes.NewReader(changed), k)
		if err != nil {
			t.Fatal(err)
		}
		out, err := io.ReadAll(d)
		if !errors.Is(err, ErrTampered) {
			t.Errorf("%s: %v", what, err)
		}
		if held := len(changed) - len(out); held < min(BufferSize, len(changed)) {
			t.Errorf("%s: only the last %d bytes were held back", what, held)
		}
	}
	small, k := encrypt(t, randomBytes(300))
	for i := range small {
		for bit := range 8 {
			c := bytes.Clone(small)
			c[i] ^= 1 << bit
			check(fmt.Sprintf("bit %d of byte %d", bit, i), k, c)
		}
		check(fmt.Sprintf("cut to %d", i), k, small[:i])
		check(fmt.Sprintf("without byte %d", i), k, append(bytes.Clone(small[:i]), small[i+1:]...))
		check(fmt.Sprintf("a byte more at %d", i), k, append(append(bytes.Clone(small[:i]), small[i]^1), small[i:]...))
	}
	check("itself appended", k, append(bytes.Clone(small), small...))

	const block = 64 << 10
	large, k := encrypt(t, randomBytes(16*block+100))
	for i := range 16 {
		for j := range i {
			c := bytes.Clone(large)
			copy(c[i*block:][:block], large[j*block:][:block])
			copy(c[j*block:][:block], large[i*block:][:block])
			check(fmt.Sprintf("blocks %d and %d swapped", i, j), k, c)
		}
		check(fmt.Sprintf("without block %d", i), k, append(bytes.Clone(large[:i*block]), large[(i+1)*block:]...))
	}
}

// TestTamperedOptions changes each byte of a layer's annotations. It is found, or
// it says the same in other words.
func TestTamperedOptions(t *testing.T) {
	fipstest.Refused(t, fipstest.JWE)
	public, private, err := utils.CreateRSATestKey(2048, nil, true)
	if err != nil {
		t.Fatal(err)
	}
	recipient := pair{public, private}
	plain := randomBytes(100)
	var ciphertext bytes.Buffer
	desc, err := Encrypt(t.Context(), &ciphertext, bytes.NewReader(plain), ocispec.MediaTypeImageLayer, recipient.encrypt())
	if err != nil {
		t.Fatal(err)
	}
	decrypted := func() ([]byte, error) {
		var out bytes.Buffer
		err := Decrypt(t.Context(), &out, bytes.NewReader(ciphertext.Bytes()), desc, recipient.decrypt())
		return out.Bytes(), err
	}
	if out, err := decrypted(); err != nil || !bytes.Equal(out, plain) {
		t.Fatalf("unchanged: %v", err)
	}
	for name, was := range desc.Annotations {
		// The text, and what it is the base64 of.
		inner, err := base64.StdEncoding.DecodeString(was)
		if err != nil {
			t.Fatal(err)
		}
		found, harmless := 0, 0
		try := func(what, value string) {
			t.Helper()
			desc.Annotations[name] = value
			out, err := decrypted()
			switch {
			case err != nil && len(out) == 0:
				found++
			case err == nil && bytes.Equal(out, plain):
				harmless++
			default:
				t.Errorf("%s: %s: %d bytes, %v", name, what, len(out), err)
			}
		}
		for i := range inner {
			for _, bit := range []byte{1, 0x20, 0x80} {
				c := bytes.Clone(inner)
				c[i] ^= bit
				try(fmt.Sprintf("byte %d ^ %#x", i, bit), base64.StdEncoding.EncodeToString(c))
			}
		}
		for i := range len(was) {
			try(fmt.Sprintf("cut to %d", i), was[:i])
		}
		try("twice", was+","+was)
		desc.Annotations[name] = was
		// Members of JSON have names of either case, and an HMAC no other value.
		t.Logf("%s: %d changes found, %d harmless", name, found, harmless)
		if found < len(inner) {
			t.Errorf("%s: only %d changes were found", name, found)
		}
		if strings.HasSuffix(name, "pubopts") {
			for _, value := range []string{`{}`, `null`, `{"cipher":"","hmac":"","cipheroptions":{}}`,
				strings.Replace(string(inner), "AES_256_CTR_HMAC_SHA256", "AES_256_CTR", 1),
				strings.Replace(string(inner), `"cipheroptions":{}`, `"cipheroptions":{"nonce":"AAAAAAAAAAAAAAAAAAAAAA=="}`, 1)} {
				desc.Annotations[name] = base64.StdEncoding.EncodeToString([]byte(value))
				if out, err := decrypted(); err == nil || len(out) > 0 {
					t.Errorf("%s: %d bytes, %v", value, len(out), err)
				}
			}
			desc.Annotations[name] = was
		}
	}
}

package processor

import (
	"bytes"
	"io"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestDecrypterReturnsTheDigestOfThePlainLayer(t *testing.T) {
	for _, size := range sizes {
		plain := randomBytes(size)
		ciphertext, k := encrypt(t, plain)
		for name, read := range map[string]func(d *Decrypter) error{
			"read": func(d *Decrypter) error {
				_, err := io.Copy(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{d})
				return err
			},
			"byte":       func(d *Decrypter) error { _, err := io.Copy(io.Discard, iotest.OneByteReader(d)); return err },
			"written":    func(d *Decrypter) error { _, err := d.WriteTo(io.Discard); return err },
			"begun":      func(d *Decrypter) error { _, err := io.CopyN(io.Discard, d, int64(size/2)); return err },
			"not at all": (*Decrypter).Verify,
		} {
			d, err := NewDecrypter(bytes.NewReader(ciphertext), k)
			if err != nil {
				t.Fatal(err)
			}
			d.HashPlain()
			if got := d.PlainDigest(); got != "" {
				t.Errorf("size %d: %s before it was read", size, got)
			}
			if err := read(d); err != nil {
				t.Fatal(err)
			}
			if err := d.Verify(); err != nil {
				t.Fatal(err)
			}
			if got := d.PlainDigest(); got != digest.FromBytes(plain) {
				t.Errorf("size %d, %s: digest %s", size, name, got)
			}
			d.Close()
		}
		if size == 0 {
			continue
		}
		ciphertext[size-1] ^= 1
		d, err := NewDecrypter(bytes.NewReader(ciphertext), k)
		if err != nil {
			t.Fatal(err)
		}
		d.HashPlain()
		if err := d.Verify(); err != ErrTampered || d.PlainDigest() != "" {
			t.Errorf("size %d: tampered with, and it has the digest %s: %v", size, d.PlainDigest(), err)
		}
	}
}

func TestSealedIsWrappedWithTheKey(t *testing.T) {
	alice := newPair(t)
	_, k := encrypt(t, []byte("plain"))
	unwrap := func(k *LayerKey) (*LayerKey, error) {
		return Unwrap(t.Context(), alice.decrypt(), ocispec.Descriptor{Annotations: wrapped(t, k, alice.encrypt(), nil)})
	}
	seal := bytes.Repeat([]byte{7}, 32)
	got, err := unwrap(k.WithSealed(seal))
	if err != nil || !bytes.Equal(got.Sealed, seal) {
		t.Fatalf("%+v, %v", got, err)
	}
	if got.Equal(k) || !got.Equal(k.WithSealed(seal)) {
		t.Error("keys with other seals are equal, or those with the same are not")
	}
	if got, err = unwrap(k); err != nil || got.Sealed != nil || !got.Equal(k) {
		t.Errorf("%+v, %v", got, err)
	}
	other := *k
	other.Digest = digest.FromString("another")
	if got.Equal(&other) {
		t.Error("keys of other content are equal")
	}
	if got, err := unwrap(k.WithSealed([]byte("short"))); err == nil {
		t.Errorf("a seal of 5 bytes: %+v", got)
	}
}

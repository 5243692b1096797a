package processor

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestEncryptDecrypt encrypts and decrypts layers in one call each.
func TestEncryptDecrypt(t *testing.T) {
	alice := newPair(t)
	for _, size := range sizes {
		plain := randomBytes(size)
		var ciphertext, out bytes.Buffer
		desc, err := Encrypt(t.Context(), &ciphertext, bytes.NewReader(plain), ocispec.MediaTypeImageLayerGzip, alice.encrypt())
		if err != nil {
			t.Fatal(err)
		}
		if desc.MediaType != ocispec.MediaTypeImageLayerGzip+"+encrypted" || desc.Digest != digest.FromBytes(ciphertext.Bytes()) || desc.Size != int64(size) {
			t.Errorf("size %d: %+v", size, desc)
		}
		if key, err := Unwrap(t.Context(), alice.decrypt(), desc); err != nil || key.Digest != digest.FromBytes(plain) {
			t.Errorf("size %d: the key names %v, %v", size, key, err)
		}
		if err := Decrypt(t.Context(), &out, &ciphertext, desc, alice.decrypt()); err != nil || !bytes.Equal(out.Bytes(), plain) {
			t.Errorf("size %d: %d bytes came back, %v", size, out.Len(), err)
		}
	}
}

func TestEncryptErrors(t *testing.T) {
	alice := newPair(t)
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	full := errors.New("disk full")
	for name, test := range map[string]struct {
		ctx  context.Context
		dst  io.Writer
		src  io.Reader
		kind string
		to   Recipients
		want string
	}{
		"encrypted already": {t.Context(), io.Discard, strings.NewReader("x"), "a+encrypted", alice.encrypt(), "media type a+encrypted can't be encrypted"},
		"for nobody":        {t.Context(), io.Discard, strings.NewReader("x"), "a", Recipients{}, "no recipient to wrap the layer key for"},
		"cancelled":         {cancelled, io.Discard, strings.NewReader("x"), "a", alice.encrypt(), "context canceled"},
		"source fails":      {t.Context(), io.Discard, iotest.ErrReader(full), "a", alice.encrypt(), "read the layer: disk full"},
		"destination fails": {t.Context(), failingWriter{full}, strings.NewReader("x"), "a", alice.encrypt(), "disk full"},
	} {
		if desc, err := Encrypt(test.ctx, test.dst, test.src, test.kind, test.to); err == nil || !strings.Contains(err.Error(), test.want) || desc.Digest != "" {
			t.Errorf("%s: %v, %v, want %q", name, desc, err, test.want)
		}
	}
}

func TestDecryptErrors(t *testing.T) {
	alice := newPair(t)
	var ciphertext bytes.Buffer
	desc, err := Encrypt(t.Context(), &ciphertext, strings.NewReader("layer"), ocispec.MediaTypeImageLayer, alice.encrypt())
	if err != nil {
		t.Fatal(err)
	}
	plain := desc
	plain.MediaType = ocispec.MediaTypeImageLayer
	full := errors.New("disk full")
	for name, test := range map[string]struct {
		dst  io.Writer
		src  string
		desc ocispec.Descriptor
		keys Keys
		want error
	}{
		"changed":           {io.Discard, "LAYER", desc, alice.decrypt(), ErrTampered},
		"no key":            {io.Discard, ciphertext.String(), desc, Keys{}, ErrNoKey},
		"no descriptor":     {io.Discard, ciphertext.String(), ocispec.Descriptor{MediaType: desc.MediaType}, alice.decrypt(), ErrNoKey},
		"destination fails": {failingWriter{full}, ciphertext.String(), desc, alice.decrypt(), full},
	} {
		if err := Decrypt(t.Context(), test.dst, strings.NewReader(test.src), test.desc, test.keys); !errors.Is(err, test.want) {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
	}
	if err := Decrypt(t.Context(), io.Discard, &ciphertext, plain, alice.decrypt()); err == nil || !strings.Contains(err.Error(), "is not that of an encrypted layer") {
		t.Errorf("a plain layer: %v", err)
	}
}

type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

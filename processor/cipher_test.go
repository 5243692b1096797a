package processor

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/containers/ocicrypt/blockcipher"
	"github.com/opencontainers/go-digest"
)

// sizes cover what the buffers do: nothing, less than one, exactly one, and
// one byte more, and several.
var sizes = []int{0, 1, 15, 16, 17, BufferSize - 1, BufferSize, BufferSize + 1, 2 * BufferSize, 3*BufferSize + 7}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

func encrypt(t testing.TB, plain []byte) ([]byte, *LayerKey) {
	t.Helper()
	k := NewLayerKey(digest.FromBytes(plain))
	e, err := NewEncrypter(bytes.NewReader(plain), k)
	if err != nil {
		t.Fatal(err)
	}
	ciphertext, err := io.ReadAll(e)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewEncrypter(bytes.NewReader(plain), k); err == nil {
		t.Fatal("a layer key encrypts a second layer")
	}
	return ciphertext, k
}

func TestRoundTrip(t *testing.T) {
	for _, size := range sizes {
		plain := randomBytes(size)
		ciphertext, k := encrypt(t, plain)
		if len(ciphertext) != size {
			t.Fatalf("size %d: ciphertext has %d bytes", size, len(ciphertext))
		}
		if size > 16 && bytes.Equal(plain, ciphertext) {
			t.Fatalf("size %d: not encrypted", size)
		}
		if k.Digest != digest.FromBytes(plain) {
			t.Errorf("size %d: layer key names %s", size, k.Digest)
		}
		readers := map[string]func(io.Reader) io.Reader{
			"whole":    func(r io.Reader) io.Reader { return r },
			"half":     iotest.HalfReader,
			"data+EOF": iotest.DataErrReader,
		}
		for name, reader := range readers {
			d, err := NewDecrypter(reader(bytes.NewReader(ciphertext)), k)
			if err != nil {
				t.Fatal(err)
			}
			if err := iotest.TestReader(d, plain); err != nil {
				t.Errorf("size %d, %s: %v", size, name, err)
			}
		}
		d, err := NewDecrypter(bytes.NewReader(ciphertext), k)
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if n, err := d.WriteTo(&out); err != nil || n != int64(size) || !bytes.Equal(out.Bytes(), plain) {
			t.Errorf("size %d: WriteTo gave %d bytes and %v", size, n, err)
		}
	}
}

func TestTampered(t *testing.T) {
	for _, size := range sizes {
		plain := randomBytes(size)
		ciphertext, k := encrypt(t, plain)
		changes := map[string][]byte{"longer": append(bytes.Clone(ciphertext), 0)}
		if size > 0 {
			changes["cut"] = ciphertext[:size-1]
			changes["empty"] = nil
			for _, at := range []int{0, size / 2, size - 1} {
				c := bytes.Clone(ciphertext)
				c[at] ^= 1
				changes[fmt.Sprintf("bit at %d", at)] = c
			}
		}
		for name, c := range changes {
			d, err := NewDecrypter(bytes.NewReader(c), k)
			if err != nil {
				t.Fatal(err)
			}
			out, err := io.ReadAll(d)
			if !errors.Is(err, ErrTampered) {
				t.Errorf("size %d, %s: error %v", size, name, err)
			}
			if len(c) <= BufferSize && len(out) > 0 {
				t.Errorf("size %d, %s: %d unverified bytes of a small layer came out", size, name, len(out))
			}
			if len(c) > 0 && len(out) > len(c)-1 {
				t.Errorf("size %d, %s: the last bytes came out unverified", size, name)
			}
			if _, err := d.Read(make([]byte, 10)); !errors.Is(err, ErrTampered) {
				t.Errorf("size %d, %s: a second read gives %v", size, name, err)
			}
			d, _ = NewDecrypter(bytes.NewReader(c), k)
			if _, err := d.WriteTo(io.Discard); !errors.Is(err, ErrTampered) {
				t.Errorf("size %d, %s: WriteTo gives %v", size, name, err)
			}
		}
	}
}

func TestReadError(t *testing.T) {
	broken := errors.New("disk on fire")
	for _, size := range sizes {
		ciphertext, k := encrypt(t, randomBytes(size))
		r := io.MultiReader(bytes.NewReader(ciphertext), iotest.ErrReader(broken))
		d, err := NewDecrypter(r, k)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(d); !errors.Is(err, broken) {
			t.Errorf("size %d: decrypting gives %v", size, err)
		}
		k = NewLayerKey("")
		e, err := NewEncrypter(io.MultiReader(bytes.NewReader(ciphertext), iotest.ErrReader(broken)), k)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(e); !errors.Is(err, broken) {
			t.Errorf("size %d: encrypting gives %v", size, err)
		}
		if _, _, err := k.PublicOptions(); err == nil {
			t.Errorf("size %d: a half-read layer has an HMAC", size)
		}
	}
}

// TestPeer checks the stream against ocicrypt's own, both ways.
func TestPeer(t *testing.T) {
	for _, size := range sizes {
		plain := randomBytes(size)

		ciphertext, k := encrypt(t, plain)
		h, err := blockcipher.NewLayerBlockCipherHandler()
		if err != nil {
			t.Fatal(err)
		}
		var opts blockcipher.LayerBlockCipherOptions
		private, err := k.private()
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(private, &opts.Private); err != nil {
			t.Fatal(err)
		}
		_, public, err := k.PublicOptions()
		if err != nil {
			t.Fatal(err)
		}
		if err := json.NewDecoder(base64.NewDecoder(base64.StdEncoding, strings.NewReader(public))).Decode(&opts.Public); err != nil {
			t.Fatal(err)
		}
		r, _, err := h.Decrypt(bytes.NewReader(ciphertext), opts)
		if err != nil {
			t.Fatal(err)
		}
		if out, err := io.ReadAll(r); err != nil || !bytes.Equal(out, plain) {
			t.Errorf("size %d: ocicrypt reads %d bytes of ours, %v", size, len(out), err)
		}

		if h, err = blockcipher.NewLayerBlockCipherHandler(); err != nil {
			t.Fatal(err)
		}
		r, finalize, err := h.Encrypt(bytes.NewReader(plain), blockcipher.AES256CTR)
		if err != nil {
			t.Fatal(err)
		}
		ciphertext, err = io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if opts, err = finalize(); err != nil {
			t.Fatal(err)
		}
		if private, err = json.Marshal(opts.Private); err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(opts.Public)
		if err != nil {
			t.Fatal(err)
		}
		if k, err = newLayerKey(private, base64.StdEncoding.EncodeToString(b)); err != nil {
			t.Fatal(err)
		}
		d, err := NewDecrypter(bytes.NewReader(ciphertext), k)
		if err != nil {
			t.Fatal(err)
		}
		if out, err := io.ReadAll(d); err != nil || !bytes.Equal(out, plain) {
			t.Errorf("size %d: we read %d bytes of ocicrypt's, %v", size, len(out), err)
		}
	}
}

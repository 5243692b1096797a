package processor

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"io"
	"testing"

	"github.com/containers/ocicrypt/blockcipher"
	"github.com/opencontainers/go-digest"
)

// benchSize is the size of the layer that is encrypted and decrypted, in bytes.
const benchSize = 64 << 20

// BenchmarkHMAC is what limits both directions: the MAC alone, on one core.
func BenchmarkHMAC(b *testing.B) {
	layer := randomBytes(benchSize)
	b.SetBytes(benchSize)
	for b.Loop() {
		m := hmac.New(sha256.New, layer[:KeySize])
		for at := 0; at < len(layer); at += BufferSize {
			m.Write(layer[at : at+BufferSize])
		}
		m.Sum(nil)
	}
}

func BenchmarkEncrypt(b *testing.B) {
	layer := randomBytes(benchSize)
	b.SetBytes(benchSize)
	b.ReportAllocs()
	for b.Loop() {
		e, err := NewEncrypter(bytes.NewReader(layer), NewLayerKey(""))
		if err != nil {
			b.Fatal(err)
		}
		if _, err := io.CopyBuffer(onlyWriter{io.Discard}, e, make([]byte, BufferSize)); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDecrypt(b *testing.B) { benchmarkDecrypt(b, false) }

// BenchmarkDecryptAndHash computes the digest of the plain layer, too, as the differ does
// where there is a rule of must-be-encrypted.
func BenchmarkDecryptAndHash(b *testing.B) { benchmarkDecrypt(b, true) }

func benchmarkDecrypt(b *testing.B, hash bool) {
	ciphertext, k := encrypt(b, randomBytes(benchSize))
	b.SetBytes(benchSize)
	b.ReportAllocs()
	for b.Loop() {
		d, err := NewDecrypter(bytes.NewReader(ciphertext), k)
		if err != nil {
			b.Fatal(err)
		}
		if hash {
			d.HashPlain()
		}
		if _, err := d.WriteTo(onlyWriter{io.Discard}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkPeerDecrypt is ocicrypt's own.
func BenchmarkPeerDecrypt(b *testing.B) {
	layer := randomBytes(benchSize)
	h, err := blockcipher.NewLayerBlockCipherHandler()
	if err != nil {
		b.Fatal(err)
	}
	r, finalize, err := h.Encrypt(bytes.NewReader(layer), blockcipher.AES256CTR)
	if err != nil {
		b.Fatal(err)
	}
	ciphertext, err := io.ReadAll(r)
	if err != nil {
		b.Fatal(err)
	}
	opts, err := finalize()
	if err != nil {
		b.Fatal(err)
	}
	opts.Private.Digest = digest.FromBytes(layer)
	b.SetBytes(benchSize)
	b.ReportAllocs()
	for b.Loop() {
		h, err := blockcipher.NewLayerBlockCipherHandler()
		if err != nil {
			b.Fatal(err)
		}
		r, _, err := h.Decrypt(bytes.NewReader(ciphertext), opts)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := io.CopyBuffer(onlyWriter{io.Discard}, r, make([]byte, BufferSize)); err != nil {
			b.Fatal(err)
		}
	}
}

// onlyWriter hides what else a writer can do.
type onlyWriter struct{ io.Writer }

package bench

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"io"
	"testing"

	"github.com/ctrlplane/pilot/processor"
)

// BenchmarkCipher compares encryption and decryption in memory with the MAC
// alone, which takes longest of what both have to do.
func BenchmarkCipher(b *testing.B) {
	plain := newMaterial(b).layer(128 << 20)
	key := processor.NewLayerKey("")
	r, err := processor.NewEncrypter(bytes.NewReader(plain), key)
	if err != nil {
		b.Fatal(err)
	}
	encrypted, err := io.ReadAll(r)
	if err != nil {
		b.Fatal(err)
	}
	mac := func() float64 {
		return rate(len(encrypted), func() {
			m := hmac.New(sha256.New, make([]byte, processor.KeySize))
			for rest := encrypted; len(rest) > 0; rest = rest[min(len(rest), processor.BufferSize):] {
				m.Write(rest[:min(len(rest), processor.BufferSize)])
			}
			m.Sum(nil)
		})
	}
	b.Run("Encrypt", func(b *testing.B) {
		compare(b, comparison{"encrypt in memory", "HMAC-SHA-256 alone", "MB/s", "≥ 0.95"}, func() float64 {
			return rate(len(plain), func() {
				r, err := processor.NewEncrypter(bytes.NewReader(plain), processor.NewLayerKey(""))
				if err != nil {
					b.Fatal(err)
				}
				if _, err := r.WriteTo(io.Discard); err != nil {
					b.Fatal(err)
				}
			})
		}, mac)
	})
	b.Run("Decrypt", func(b *testing.B) {
		compare(b, comparison{"decrypt in memory", "HMAC-SHA-256 alone", "MB/s", "≥ 0.95"}, func() float64 {
			return rate(len(encrypted), func() {
				r, err := processor.NewDecrypter(bytes.NewReader(encrypted), key)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := r.WriteTo(io.Discard); err != nil {
					b.Fatal(err)
				}
			})
		}, mac)
	})
}

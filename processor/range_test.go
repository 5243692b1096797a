package processor

import (
	"bytes"
	"crypto/aes"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/opencontainers/go-digest"
)

// TestKeyStreamDecryptsFromAnyOffset compares parts of layers with what the Decrypter makes
// of the whole, also where the counter carries into its upper half.
func TestKeyStreamDecryptsFromAnyOffset(t *testing.T) {
	plain := make([]byte, 3*BufferSize+5)
	for i := range plain {
		plain[i] = byte(rand.Uint32())
	}
	for _, low := range []uint64{0, 1 << 63, 1<<64 - 1, 1<<64 - 2, 1<<64 - 4096, rand.Uint64()} {
		key := NewLayerKey(digest.FromBytes(plain))
		for i := range 8 {
			key.nonce[15-i] = byte(low >> (8 * i))
		}
		if low == 1<<64-1 {
			copy(key.nonce, bytes.Repeat([]byte{0xff}, 8)) // it wraps around
		}
		e, err := NewEncrypter(bytes.NewReader(plain), key)
		if err != nil {
			t.Fatal(err)
		}
		ciphertext, err := io.ReadAll(e)
		if err != nil {
			t.Fatal(err)
		}
		d, err := NewDecrypter(bytes.NewReader(ciphertext), key)
		if err != nil {
			t.Fatal(err)
		}
		whole, err := io.ReadAll(d)
		if err != nil {
			t.Fatal(err)
		}
		offsets := []int{0, 1, 15, 16, 17, 4095, 4096, BufferSize - 1, BufferSize, len(plain) - 1, len(plain)}
		for range 200 {
			offsets = append(offsets, rand.IntN(len(plain)))
		}
		for _, off := range offsets {
			end := off + rand.IntN(len(plain)-off+1)
			stream, err := key.KeyStream(int64(off))
			if err != nil {
				t.Fatal(err)
			}
			part := bytes.Clone(ciphertext[off:end])
			// In pieces, as it comes from a registry.
			for rest := part; len(rest) > 0; {
				n := 1 + rand.IntN(len(rest))
				stream.XORKeyStream(rest[:n], rest[:n])
				rest = rest[n:]
			}
			if !bytes.Equal(part, whole[off:end]) {
				t.Fatalf("nonce %x: bytes %d to %d are not those of the Decrypter", key.nonce, off, end)
			}
		}
	}
}

func TestKeyStreamRefusesNegativeOffset(t *testing.T) {
	if _, err := NewLayerKey("").KeyStream(-1); err == nil {
		t.Error("no error")
	}
}

func BenchmarkKeyStream(b *testing.B) {
	key := NewLayerKey("")
	for name, size := range map[string]int{"64KiB": 64 << 10, "1MiB": 1 << 20} {
		b.Run(name, func(b *testing.B) {
			part := make([]byte, size)
			b.SetBytes(int64(size))
			for i := range b.N {
				stream, err := key.KeyStream(int64(i) * (aes.BlockSize + 1))
				if err != nil {
					b.Fatal(err)
				}
				stream.XORKeyStream(part, part)
			}
		})
	}
}

package processor

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
)

// KeyStream returns a cipher whose XORKeyStream decrypts the layer's ciphertext from an
// offset in bytes on, in order. Nothing of that is authenticated: the HMAC covers the layer
// as a whole, and a changed bit of the ciphertext is the same bit changed of the plain
// layer. Callers have to check what they decrypt in another way.
//
// The cipher is the caller's alone, and works on after [LayerKey.Clear].
func (k *LayerKey) KeyStream(offset int64) (cipher.Stream, error) {
	if offset < 0 {
		return nil, errors.New("negative offset in a layer")
	}
	block, err := aes.NewCipher(k.key)
	if err != nil {
		return nil, err
	}
	var counter [aes.BlockSize]byte
	high, low := binary.BigEndian.Uint64(k.nonce), binary.BigEndian.Uint64(k.nonce[8:])
	sum := low + uint64(offset/aes.BlockSize)
	if sum < low {
		high++
	}
	binary.BigEndian.PutUint64(counter[:], high)
	binary.BigEndian.PutUint64(counter[8:], sum)
	stream := cipher.NewCTR(block, counter[:])
	skip := make([]byte, offset%aes.BlockSize)
	stream.XORKeyStream(skip, skip)
	return stream, nil
}

// Package aesgcm is AES-GCM with random nonces, in the one way that FIPS 140-3 approves.
package aesgcm

import (
	"crypto/aes"
	"crypto/cipher"
)

// New returns the cipher of a key of 16, 24 or 32 bytes. It chooses its nonces itself, so
// its Seal and Open take none: what Seal returns is a random nonce of 12 bytes, the
// ciphertext, and a tag of 16 bytes.
func New(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

package keystore

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
)

// NewGCM returns the cipher of an AES key.
func NewGCM(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// Seal encrypts b and binds it to the place that name tells. What it returns is
// a random 12-byte nonce, the ciphertext, and a 16-byte tag.
func Seal(aead cipher.AEAD, b, name []byte) []byte {
	nonce := make([]byte, aead.NonceSize(), aead.NonceSize()+len(b)+aead.Overhead())
	rand.Read(nonce) // never fails
	return aead.Seal(nonce, nonce, b, name)
}

// Unseal undoes Seal.
func Unseal(aead cipher.AEAD, b, name []byte) ([]byte, error) {
	n := aead.NonceSize()
	if len(b) < n {
		return nil, errors.New("it is cut short")
	}
	return aead.Open(nil, b[:n], b[n:], name)
}

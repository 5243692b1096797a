package copilot_test

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"testing"
)

// sealAnnotation wraps a key as pilot does.
func sealAnnotation(t *testing.T, key []byte, additional string, plaintext []byte) (iv, sealed []byte) {
	t.Helper()
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	iv = make([]byte, 12)
	rand.Read(iv)
	return iv, aead.Seal(nil, iv, plaintext, []byte(additional))
}

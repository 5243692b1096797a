package processor

import (
	"crypto/hmac"
	"io"

	"github.com/opencontainers/go-digest"
)

// Reproduce encrypts the plain layer that r reads once more, under k, which has encrypted
// a layer before, and returns the digest of the ciphertext. The error is [ErrTampered]
// unless the ciphertext has the HMAC that k has: it is that of another layer, or of
// another key. None of the ciphertext is handed out, so that no second layer is ever
// encrypted under k.
func (k *LayerKey) Reproduce(r io.Reader) (digest.Digest, error) {
	again := &LayerKey{key: k.key, nonce: k.nonce}
	e, err := NewEncrypter(r, again)
	if err != nil {
		return "", err
	}
	defer e.Close()
	digester := digest.Canonical.Digester()
	if _, err := e.WriteTo(digester.Hash()); err != nil {
		return "", err
	}
	if !hmac.Equal(again.mac, k.mac) {
		return "", ErrTampered
	}
	return digester.Digest(), nil
}

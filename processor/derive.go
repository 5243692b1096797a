package processor

import (
	"crypto/hkdf"
	"crypto/sha256"
)

// Derive returns a key of 32 bytes for another purpose than encrypting the layer,
// which info names. It is derived by HKDF (RFC 5869) with SHA-256, the layer key as
// secret and the nonce as salt, so only those who can decrypt the layer know it.
func (k *LayerKey) Derive(info string) []byte {
	key, err := hkdf.Key(sha256.New, k.key, k.nonce, info, sha256.Size)
	if err != nil {
		panic(err) // of the length alone
	}
	return key
}

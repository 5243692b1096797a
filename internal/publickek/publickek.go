// Package publickek has the public halves of KEKs: with one, layer keys are wrapped by
// somebody who has neither the KEK nor a broker. It is HPKE (RFC 9180) in base mode with
// MLKEM768-X25519 (draft-ietf-hpke-pq), HKDF-SHA256 and AES-256-GCM.
//
// The suite is hybrid: an attacker has to break both ML-KEM-768 and X25519.
// docs/formats.md describes the derivation, the annotation and the file.
package publickek

import (
	"crypto/hkdf"
	"crypto/hpke"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"

	"github.com/ctrlplane/pilot/internal/fips"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// Size is the size of a public key in bytes: 1184 of ML-KEM-768 and 32 of X25519.
const Size = 1216

// label separates the derivation of private keys from all other uses of a KEK.
const label = "pilot public key "

// ErrNotUnwrapped is the error of a layer key that was not wrapped for this KEK and
// version, or was changed.
var ErrNotUnwrapped = errors.New("the layer key was wrapped for another public key, or the annotation was changed")

func kem() hpke.KEM { return hpke.MLKEM768X25519() }

// bound returns what a wrapped key is bound to: method, KEK and version.
func bound(id string, version int) []byte {
	return wireformat.AdditionalData(wireformat.MethodHPKE, id, version)
}

// PrivateKey unwraps what was wrapped for the public half of one version of a KEK. It is
// safe for concurrent use.
type PrivateKey struct {
	id      string
	version int
	key     hpke.PrivateKey
	clear   sync.Once
}

// Derive returns the private key of a version of a KEK, which has 32 bytes.
// The error wraps [fips.ErrNotApproved] where it could not unwrap.
func Derive(kek []byte, id string, version int) (*PrivateKey, error) {
	if err := fips.RefuseHPKE(); err != nil {
		return nil, err
	}
	if len(kek) != wireformat.KEKSize {
		return nil, fmt.Errorf("KEK %q has %d bytes, and only KEKs of %d bytes have a public half", id, len(kek), wireformat.KEKSize)
	}
	ikm, err := hkdf.Key(sha256.New, kek, nil, label+string(bound(id, version)), 32)
	if err != nil {
		return nil, err
	}
	defer clear(ikm)
	key, err := kem().DeriveKeyPair(ikm)
	if err != nil {
		return nil, err
	}
	return &PrivateKey{id: id, version: version, key: key}, nil
}

// Clear overwrites the seed of the key, which has to be dropped then. What crypto/mlkem
// and crypto/ecdh have made of the seed can't be overwritten. Calls of Unwrap that are in
// progress do not need the seed.
func (k *PrivateKey) Clear() {
	k.clear.Do(func() {
		seed, err := k.key.Bytes() // not a copy
		if err == nil {
			clear(seed)
		}
	})
}

// Public returns the public key.
func (k *PrivateKey) Public() PublicKey {
	return PublicKey{ID: k.id, Version: k.version, key: k.key.PublicKey()}
}

// Unwrap returns the layer key in an annotation of the method HPKE that was validated. The
// error is [ErrNotUnwrapped] if it can't be unwrapped.
func (k *PrivateKey) Unwrap(a wireformat.Annotation) ([]byte, error) {
	r, err := hpke.NewRecipient(a.Enc, k.key, hpke.HKDFSHA256(), hpke.AES256GCM(), bound(a.KEKID, a.KEKVersion))
	if err != nil {
		return nil, ErrNotUnwrapped
	}
	layerKey, err := r.Open(nil, a.WrappedKey)
	if err != nil {
		return nil, ErrNotUnwrapped
	}
	return layerKey, nil
}

// PublicKey is the public half of one version of a KEK.
type PublicKey struct {
	ID      string
	Version int
	key     hpke.PublicKey
}

// newPublicKey returns a public key of Size bytes.
func newPublicKey(b []byte, id string, version int) (PublicKey, error) {
	if len(b) != Size {
		return PublicKey{}, fmt.Errorf("the public key has %d bytes, and those of %s have %d", len(b), wireformat.MethodHPKE, Size)
	}
	key, err := kem().NewPublicKey(b)
	if err != nil {
		return PublicKey{}, fmt.Errorf("it is no public key of %s: %w", wireformat.MethodHPKE, err)
	}
	return PublicKey{ID: id, Version: version, key: key}, nil
}

// Bytes returns the key's Size bytes.
func (k PublicKey) Bytes() []byte { return k.key.Bytes() }

// Wrap wraps a layer key for the KEK.
func (k PublicKey) Wrap(layerKey []byte) (wireformat.Annotation, error) {
	if err := fips.RefuseHPKE(); err != nil {
		return wireformat.Annotation{}, err
	}
	enc, s, err := hpke.NewSender(k.key, hpke.HKDFSHA256(), hpke.AES256GCM(), bound(k.ID, k.Version))
	if err != nil {
		return wireformat.Annotation{}, err
	}
	wrapped, err := s.Seal(nil, layerKey)
	return wireformat.Annotation{
		Method: wireformat.MethodHPKE, KEKID: k.ID, KEKVersion: k.Version, Enc: enc, WrappedKey: wrapped,
	}, err
}

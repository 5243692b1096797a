package keyring

import (
	"context"
	"errors"
	"fmt"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/internal/publickek"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// ErrNoPublic is the error of a KEK that has no public half.
var ErrNoPublic = errors.New("this KEK has no public half")

// Public returns the public half of the current version of a KEK. The error wraps
// [ErrNoPublic] if the KEK is in a KMS, or has not 32 bytes.
func (r *Keyring) Public(ctx context.Context, k KEK) (publickek.PublicKey, error) {
	private, err := r.private(ctx, k, 0)
	if err != nil {
		return publickek.PublicKey{}, err
	}
	defer private.Clear()
	return private.Public(), nil
}

// private returns the private key of a version of a KEK, or of its current one if version
// is 0. The caller clears it.
func (r *Keyring) private(ctx context.Context, k KEK, version int) (*publickek.PrivateKey, error) {
	if k.backend != nil {
		return nil, fmt.Errorf("%w: it is in %s, and only KEKs in copilot's own store have one", ErrNoPublic, k.Backend)
	}
	key, version, err := r.Key(ctx, k, version)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	if len(key) != keystore.KeySize {
		return nil, fmt.Errorf("%w: it has %d bytes, and only KEKs of %d bytes have one", ErrNoPublic, len(key), keystore.KeySize)
	}
	return publickek.Derive(key, k.ID, version)
}

// unwrapHPKE unwraps what was wrapped for the public half of a KEK.
func (r *Keyring) unwrapHPKE(ctx context.Context, k KEK, w Wrapped) ([]byte, error) {
	a := wireformat.Annotation{Method: w.Method, KEKID: k.ID, KEKVersion: w.Version, IV: w.IV, Enc: w.Enc, WrappedKey: w.Key}
	if err := a.Validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", keystore.ErrInput, err)
	}
	private, err := r.private(ctx, k, w.Version)
	if err != nil {
		return nil, err
	}
	defer private.Clear()
	layerKey, err := private.Unwrap(a)
	if err != nil {
		return nil, kms.ErrUnwrap
	}
	return layerKey, nil
}

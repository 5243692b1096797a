package server

import (
	"context"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/internal/aesgcm"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// wrap wraps plaintext with the current version, inside the KMS if that does
// not give the key out.
func (r *keyring) wrap(ctx context.Context, k kek, plaintext []byte) (wrapped, error) {
	if !k.wrapsHere() {
		return r.wrapInside(ctx, k, plaintext, true)
	}
	key, version, err := r.current(ctx, k, 1)
	if err != nil {
		return wrapped{}, err
	}
	defer clear(key)
	return k.wrapWith(key, version, plaintext)
}

// wrapUncounted is wrap for a try, which wears no version out.
func (r *keyring) wrapUncounted(ctx context.Context, k kek, plaintext []byte) (wrapped, error) {
	if !k.wrapsHere() {
		return r.wrapInside(ctx, k, plaintext, false)
	}
	key, version, err := r.key(ctx, k, 0)
	if err != nil {
		return wrapped{}, err
	}
	defer clear(key)
	return k.wrapWith(key, version, plaintext)
}

// wrapWith wraps plaintext with the key of a version.
func (k kek) wrapWith(key []byte, version int, plaintext []byte) (wrapped, error) {
	aead, err := newGCM(key)
	if err != nil {
		return wrapped{}, err
	}
	sealed := aead.Seal(nil, nil, plaintext, wireformat.AdditionalData(wireformat.MethodA256GCMKW, k.ID, version))
	return wrapped{Version: version, Method: wireformat.MethodA256GCMKW, IV: sealed[:wireformat.IVSize], Key: sealed[wireformat.IVSize:]}, nil
}

// wrapInside wraps inside a KMS, and counts that if it is counted.
func (r *keyring) wrapInside(ctx context.Context, k kek, plaintext []byte, counted bool) (w wrapped, err error) {
	wrapper, ok := k.backend.(kms.Wrapper)
	if !ok {
		return wrapped{}, fmt.Errorf("%s neither gives keys out nor wraps", k.Backend)
	}
	if err := r.store.CheckUse(k.KEK, 0); err != nil {
		return wrapped{}, err
	}
	// The KMS wraps a key of ours, which seals the plaintext: so it is bound
	// to the KEK's name, and may have any size, whatever the KMS can do.
	inner := make([]byte, kms.MaxPlaintext)
	rand.Read(inner) // never fails
	defer clear(inner)
	var wrappedInner []byte
	err = r.call(ctx, k, "wrap", func(ctx context.Context) (err error) {
		w.Version, wrappedInner, err = wrapper.Wrap(ctx, k.path, inner)
		return err
	})
	if err == nil {
		err = r.store.CheckUse(k.KEK, w.Version)
	}
	if err != nil {
		return wrapped{}, err
	}
	if _, unlimited := k.backend.(kms.Unlimited); !unlimited && counted {
		over, err := r.count(ctx, k, w.Version, 1)
		if err == nil && over {
			err = r.rotateFull(ctx, k, w.Version)
		}
		if err != nil {
			return wrapped{}, err
		}
	}
	aead, err := newGCM(inner)
	if err != nil {
		return wrapped{}, err
	}
	w.Method = wireformat.MethodCopilot
	w.Key, err = json.Marshal(envelope{wrappedInner, aead.Seal(nil, nil, plaintext, place(k.ID, w.Version))})
	return w, err
}

// envelope is a key that was wrapped inside a KMS.
type envelope struct {
	Key    []byte `json:"key"`    // 32 bytes, wrapped by the KMS
	Sealed []byte `json:"sealed"` // 12-byte nonce, what was sealed with that key, 16-byte tag
}

// unwrap undoes wrap, and what pilot wrapped itself with a KEK that it was
// given. Errors wrap [kms.ErrUnwrap] if the key was not made by this KEK and
// version, or was changed.
func (r *keyring) unwrap(ctx context.Context, k kek, w wrapped) ([]byte, error) {
	switch {
	case w.Method == wireformat.MethodCopilot && w.IV == nil && !k.wrapsHere():
		return r.unwrapInside(ctx, k, w.Version, w.Key)
	case w.Method == wireformat.MethodA256GCMKW && len(w.IV) == wireformat.IVSize:
	default:
		return nil, fmt.Errorf("%w: method is %.40q with an iv of %d bytes, which this KEK does not unwrap: %s has 12, and %s, for a KEK that stays in its KMS, none",
			keystore.ErrInput, w.Method, len(w.IV), wireformat.MethodA256GCMKW, wireformat.MethodCopilot)
	}
	key, _, err := r.key(ctx, k, w.Version)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	aead, err := newGCM(key)
	if err != nil {
		return nil, err
	}
	return open(aead, slices.Concat(w.IV, w.Key), wireformat.AdditionalData(wireformat.MethodA256GCMKW, k.ID, w.Version))
}

func (r *keyring) unwrapInside(ctx context.Context, k kek, version int, wrapped []byte) ([]byte, error) {
	wrapper, ok := k.backend.(kms.Wrapper)
	if !ok {
		return nil, fmt.Errorf("%s neither gives keys out nor wraps", k.Backend)
	}
	if err := r.store.CheckUse(k.KEK, version); err != nil {
		return nil, err
	}
	var e envelope
	if json.Unmarshal(wrapped, &e) != nil {
		return nil, kms.ErrUnwrap
	}
	var inner []byte
	err := r.call(ctx, k, "unwrap", func(ctx context.Context) (err error) {
		inner, err = wrapper.Unwrap(ctx, k.path, version, e.Key)
		return err
	})
	if err != nil {
		return nil, err
	}
	defer clear(inner)
	if len(inner) != kms.MaxPlaintext {
		return nil, kms.ErrUnwrap
	}
	aead, err := newGCM(inner)
	if err != nil {
		return nil, err
	}
	return open(aead, e.Sealed, place(k.ID, version))
}

// place is what a key that is wrapped inside a KMS is bound to.
func place(id string, version int) []byte {
	return fmt.Appendf(nil, "kek %d %s", version, id)
}

// newGCM returns the cipher of a key that can wrap.
func newGCM(key []byte) (cipher.AEAD, error) {
	if len(key) != keystore.KeySize {
		return nil, fmt.Errorf("%w: the KEK has %d bytes, and only one of %d bytes wraps here", keystore.ErrInput, len(key), keystore.KeySize)
	}
	return aesgcm.New(key)
}

// open opens what was sealed, the nonce first.
func open(aead cipher.AEAD, sealed, additional []byte) ([]byte, error) {
	plaintext, err := aead.Open(nil, nil, sealed, additional)
	if err != nil {
		return nil, kms.ErrUnwrap
	}
	return plaintext, nil
}

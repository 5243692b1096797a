package keyring

import (
	"cmp"
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

// Wrapped is a key that was wrapped with a KEK, as in the HTTP API.
type Wrapped struct {
	Version int    `json:"version"`
	Method  string `json:"method"`
	IV      []byte `json:"iv,omitempty"`
	Enc     []byte `json:"enc,omitempty"` // of HPKE
	Key     []byte `json:"wrappedKey"`
}

// Wrap wraps plaintext with the current version, inside the KMS if that keeps the key. The
// method is A256GCM for guests of Confidential Containers, which have to get the key, and
// else empty.
func (r *Keyring) Wrap(ctx context.Context, k KEK, plaintext []byte, method string) (Wrapped, error) {
	switch {
	case method != "" && method != wireformat.MethodCoCo:
		return Wrapped{}, fmt.Errorf("%w: method %.40q is not %s: leave it out for the broker's own", keystore.ErrInput, method, wireformat.MethodCoCo)
	case method != "" && !k.WrapsHere():
		return Wrapped{}, fmt.Errorf("%w, and it stays in its KMS: no guest of Confidential Containers can get it", ErrNotExported)
	case !k.WrapsHere():
		return r.wrapInside(ctx, k, plaintext, true)
	}
	key, version, err := r.Current(ctx, k, 1)
	if err != nil {
		return Wrapped{}, err
	}
	defer clear(key)
	return k.wrapWith(key, version, plaintext, cmp.Or(method, wireformat.MethodA256GCMKW))
}

// wrapUncounted is [Keyring.Wrap] for a check, which is not counted.
func (r *Keyring) wrapUncounted(ctx context.Context, k KEK, plaintext []byte) (Wrapped, error) {
	if !k.WrapsHere() {
		return r.wrapInside(ctx, k, plaintext, false)
	}
	key, version, err := r.Key(ctx, k, 0)
	if err != nil {
		return Wrapped{}, err
	}
	defer clear(key)
	return k.wrapWith(key, version, plaintext, wireformat.MethodA256GCMKW)
}

// wrapWith wraps plaintext with the key of a version.
func (k KEK) wrapWith(key []byte, version int, plaintext []byte, method string) (Wrapped, error) {
	aead, err := newGCM(key)
	if err != nil {
		return Wrapped{}, err
	}
	sealed := aead.Seal(nil, nil, plaintext, k.additional(method, version))
	return Wrapped{Version: version, Method: method, IV: sealed[:wireformat.IVSize], Key: sealed[wireformat.IVSize:]}, nil
}

// additional returns the additional data of what is wrapped with a version.
func (k KEK) additional(method string, version int) []byte {
	if method == wireformat.MethodCoCo {
		return nil
	}
	return wireformat.AdditionalData(method, k.ID, version)
}

// wrapInside wraps inside a KMS, and counts it if counted is true.
func (r *Keyring) wrapInside(ctx context.Context, k KEK, plaintext []byte, counted bool) (w Wrapped, err error) {
	wrapper, ok := k.backend.(kms.Wrapper)
	if !ok {
		return Wrapped{}, fmt.Errorf("backend %s neither exports keys nor wraps", k.Backend)
	}
	if err := r.Store.CheckUse(k.KEK, 0); err != nil {
		return Wrapped{}, err
	}
	// The KMS wraps a random key, which seals the plaintext: so the plaintext is bound to
	// the KEK's name, and may have any size, whatever the KMS supports.
	inner := make([]byte, kms.MaxPlaintext)
	rand.Read(inner) // never fails
	defer clear(inner)
	var wrappedInner []byte
	err = r.call(ctx, k, "wrap", func(ctx context.Context) (err error) {
		w.Version, wrappedInner, err = wrapper.Wrap(ctx, k.Path, inner)
		return err
	})
	if err == nil {
		err = r.Store.CheckUse(k.KEK, w.Version)
	}
	if err != nil {
		return Wrapped{}, err
	}
	if _, unlimited := k.backend.(kms.Unlimited); !unlimited && counted {
		over, err := r.count(ctx, k, w.Version, 1)
		if err == nil && over {
			err = r.rotateFull(ctx, k, w.Version)
		}
		if err != nil {
			return Wrapped{}, err
		}
	}
	aead, err := newGCM(inner)
	if err != nil {
		return Wrapped{}, err
	}
	w.Method = wireformat.MethodCopilot
	w.Key, err = json.Marshal(envelope{wrappedInner, aead.Seal(nil, nil, plaintext, boundTo(k.ID, w.Version))})
	return w, err
}

// envelope is a key that was wrapped inside a KMS.
type envelope struct {
	Key    []byte `json:"key"`    // 32 bytes, wrapped by the KMS
	Sealed []byte `json:"sealed"` // 12-byte nonce, what was sealed with that key, 16-byte tag
}

// Unwrap undoes [Keyring.Wrap], and what pilot has wrapped with an exported KEK or for the
// public half of one, or CoCo's key provider with the same key. The caller clears the result. Errors wrap [kms.ErrUnwrap] if the key was not wrapped with
// this KEK and version, or was changed.
func (r *Keyring) Unwrap(ctx context.Context, k KEK, w Wrapped) ([]byte, error) {
	switch {
	case w.Method == wireformat.MethodHPKE:
		return r.unwrapHPKE(ctx, k, w)
	case w.Method == wireformat.MethodCopilot && w.IV == nil && !k.WrapsHere():
		return r.unwrapInside(ctx, k, w.Version, w.Key)
	case (w.Method == wireformat.MethodA256GCMKW || w.Method == wireformat.MethodCoCo) && len(w.IV) == wireformat.IVSize && w.Enc == nil:
	default:
		return nil, fmt.Errorf("%w: this KEK does not unwrap method %.40q with an iv of %d bytes: %s has 12 bytes, and %s, for a KEK that stays in its KMS, none",
			keystore.ErrInput, w.Method, len(w.IV), wireformat.MethodA256GCMKW, wireformat.MethodCopilot)
	}
	key, _, err := r.Key(ctx, k, w.Version)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	aead, err := newGCM(key)
	if err != nil {
		return nil, err
	}
	return open(aead, slices.Concat(w.IV, w.Key), k.additional(w.Method, w.Version))
}

func (r *Keyring) unwrapInside(ctx context.Context, k KEK, version int, wrapped []byte) ([]byte, error) {
	wrapper, ok := k.backend.(kms.Wrapper)
	if !ok {
		return nil, fmt.Errorf("backend %s neither exports keys nor wraps", k.Backend)
	}
	if err := r.Store.CheckUse(k.KEK, version); err != nil {
		return nil, err
	}
	var e envelope
	if json.Unmarshal(wrapped, &e) != nil {
		return nil, kms.ErrUnwrap
	}
	var inner []byte
	err := r.call(ctx, k, "unwrap", func(ctx context.Context) (err error) {
		inner, err = wrapper.Unwrap(ctx, k.Path, version, e.Key)
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
	return open(aead, e.Sealed, boundTo(k.ID, version))
}

// boundTo is the additional data of a key that is wrapped inside a KMS.
func boundTo(id string, version int) []byte {
	return fmt.Appendf(nil, "kek %d %s", version, id)
}

// newGCM returns the cipher of a key that can wrap.
func newGCM(key []byte) (cipher.AEAD, error) {
	if len(key) != keystore.KeySize {
		return nil, fmt.Errorf("%w: the KEK has %d bytes, and only KEKs of %d bytes wrap in copilot", keystore.ErrInput, len(key), keystore.KeySize)
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

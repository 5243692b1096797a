package processor

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/containers/ocicrypt/config"
)

// ErrDenied is the error of a key provider that works, but refuses: the caller may not
// use the KEK, or there is none of that name.
var ErrDenied = errors.New("denied")

// KeyProvider wraps and unwraps layer keys with keys of its own. It is safe for
// concurrent use, and gives up when ctx is done. Package ocicryptclient, below this
// one, has those of other programs; package keyprovider has pilot's own.
//
// Its layer key is what ocicrypt wraps: JSON of some 200 bytes, with the key and the
// nonce of the layer.
type KeyProvider interface {
	// WrapKey wraps a layer key for the recipients that params name, such as the
	// IDs of KEKs. The layer key is the caller's: the key provider must neither
	// change it nor keep it. The annotation is not empty.
	WrapKey(ctx context.Context, params [][]byte, layerKey []byte) (annotation []byte, err error)
	// UnwrapKey returns the layer key that an annotation holds, which the caller
	// clears. params are those of keys provider:NAME:PARAMETER, mostly none. An error
	// that wraps [ErrDenied] says that another attempt is in vain.
	UnwrapKey(ctx context.Context, params [][]byte, annotation []byte) (layerKey []byte, err error)
}

// Keys are what layer keys are unwrapped with. The zero value has none.
type Keys struct {
	// Providers are key providers by name: that of a recipient provider:NAME:KEK.
	Providers map[string]KeyProvider
	// ProvidersErr says why Providers may lack one, such as a file that can't be
	// read. It is part of the error of a layer that needs such a key provider. May
	// be nil.
	ProvidersErr error
	// Private are private keys, and parameters for key providers by their names, as
	// ocicrypt has them. May be nil.
	Private *config.DecryptConfig
}

// Recipients say for whom a layer key is wrapped.
type Recipients struct {
	// Keys has the key providers that wrap. What was wrapped is unwrapped again
	// where its private keys can.
	Keys
	// Parameters are the recipients, by ocicrypt's names: public keys in PEM, DER or
	// JWK as "pubkeys" (JWE), certificates as "x509s" (PKCS #7), names in
	// "gpg-pubkeyringfile" as "gpg-recipients" (OpenPGP), key files as
	// "pkcs11-pubkeys" or "pkcs11-yamls" (PKCS #11), and for a key provider, as its
	// name, what it wraps for, such as the ID of a KEK.
	Parameters map[string][][]byte
}

// With returns k with the keys of dc, which may be nil, before its own.
func (k Keys) With(dc *config.DecryptConfig) Keys {
	k.Private = combined(dc, k.Private)
	return k
}

// provider returns the key provider of that name.
func (k Keys) provider(name string) (KeyProvider, error) {
	if p := k.Providers[name]; p != nil {
		return p, nil
	}
	missing := fmt.Errorf("key provider %.60q %w: name it in the file that $OCICRYPT_KEYPROVIDER_CONFIG points to", name, errNotConfigured)
	if k.ProvidersErr != nil {
		return nil, fmt.Errorf("%w: %w", missing, k.ProvidersErr)
	}
	return nil, missing
}

// private returns the private keys, never nil.
func (k Keys) private() *config.DecryptConfig {
	if k.Private == nil {
		return &config.DecryptConfig{}
	}
	return k.Private
}

// combined returns the keys of all of dcs, of which any may be nil. No slice of it is
// one of theirs, so that what is appended to one is in no other; the keys themselves
// are.
func combined(dcs ...*config.DecryptConfig) *config.DecryptConfig {
	all := &config.DecryptConfig{Parameters: map[string][][]byte{}}
	for _, dc := range dcs {
		if dc == nil {
			continue
		}
		for name, values := range dc.Parameters {
			all.Parameters[name] = append(all.Parameters[name], values...)
		}
	}
	return all
}

// clonedKeys returns a copy of dc that shares nothing with it.
func clonedKeys(dc *config.DecryptConfig) *config.DecryptConfig {
	own := combined(dc)
	for _, values := range own.Parameters {
		for i, v := range values {
			values[i] = bytes.Clone(v)
		}
	}
	return own
}

// clearKeys overwrites the keys of dc.
func clearKeys(dc *config.DecryptConfig) {
	for _, values := range dc.Parameters {
		for _, v := range values {
			clear(v)
		}
	}
}

// Package kms says what copilot needs of a key management system (KMS) in which key
// encryption keys (KEKs) live. Each kind of KMS has a package of its own below, which a
// build tag leaves out.
package kms

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Errors that a caller can test for. The errors that wrap them say what the
// KMS answered and what to do.
var (
	// ErrNotFound: the KMS has no such key, or no such version.
	ErrNotFound = errors.New("not in the KMS")
	// ErrForbidden: the KMS denies this to the broker.
	ErrForbidden = errors.New("the KMS forbids it to the broker")
	// ErrUnavailable: the KMS gave no usable answer in time. A retry may help.
	ErrUnavailable = errors.New("the KMS gives no usable answer")
	// ErrUnwrap: the wrapped key was not wrapped with this KEK, or was changed.
	ErrUnwrap = errors.New("this KEK did not wrap that key, or it was changed")
)

// Backend is one KMS. It is also a [Giver], a [Wrapper], a [Rotator], or
// several of these. It is safe for concurrent use, and
// returns when the context of a call is done.
type Backend interface {
	Close() error
}

// Giver is a KMS that exports keys.
type Giver interface {
	// Key returns the key at path in a version, or in its current one if
	// version is 0, and that version, from 1. A KEK of another size than 16,
	// 24 or 32 bytes is an error. The caller clears the key.
	Key(ctx context.Context, path string, version int) (key []byte, v int, err error)
}

// Wrapper is a KMS that wraps and unwraps with keys which never leave it.
type Wrapper interface {
	// Wrap wraps plaintext, at most [MaxPlaintext] bytes, with the current
	// version of the key at path, and returns that version: from 1, or 1 if the
	// KMS keeps versions to itself.
	Wrap(ctx context.Context, path string, plaintext []byte) (version int, wrapped []byte, err error)
	// Unwrap undoes Wrap. Errors wrap [ErrUnwrap] if wrapped is not what Wrap
	// returned for path and version.
	Unwrap(ctx context.Context, path string, version int, wrapped []byte) ([]byte, error)
}

// Rotator is a KMS in which the broker may make new versions of a key.
type Rotator interface {
	// Rotate makes a new version, from which on new keys are wrapped, and
	// returns it. Of concurrent calls each makes one, or fails.
	Rotate(ctx context.Context, path string) (version int, err error)
}

// MaxPlaintext is what a [Wrapper] has to accept, in bytes. The broker wraps a
// random key with it, and seals layer keys with that.
const MaxPlaintext = 32

// Settings are the members of a backend's table in the configuration, without
// its type.
type Settings func(v any) error

// Types are kinds of KMS: the function that opens a backend, by the type that a
// configuration calls it. It does not connect yet, so that a broker starts while its KMS
// is down.
type Types map[string]func(Settings) (Backend, error)

// Open opens a backend of a type. Settings decodes the backend's settings into
// a struct and refuses those that the struct has no field for.
func (t Types) Open(kind string, settings Settings) (Backend, error) {
	open, ok := t[kind]
	if !ok {
		return nil, fmt.Errorf("unknown backend type %.40q: this copilot has %s", kind, strings.Join(slices.Sorted(maps.Keys(t)), ", "))
	}
	return open(settings)
}

// Unlimited is a [Wrapper] whose keys may wrap any number of keys, rotated or
// not: nothing that it does with a key gets weaker with the number of times that
// it was done. AES-GCM with random nonces does, so a key of that kind wraps
// 2^32 keys at most (NIST SP 800-38D, section 8.3), and its versions can be
// distinguished.
type Unlimited interface {
	Unlimited()
}

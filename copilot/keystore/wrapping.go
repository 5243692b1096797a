package keystore

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"time"

	"github.com/ctrlplane/pilot/copilot/kms"
)

// Wrapping is a key in a KMS that wraps the master key.
type Wrapping struct {
	Backend string // its name in the configuration
	Path    string // of the key, there
	// Open connects to the KMS, for the time of a call.
	Open func() (kms.Backend, error)
}

func (w Wrapping) String() string { return Holder{Backend: w.Backend, Path: w.Path}.String() }

// wrappingTimeout bounds a call of a KMS. It is longer than one for a request: an HSM may
// have to log in first.
const wrappingTimeout = 20 * time.Second

// SealedError is the error of a master key that its KMS does not unwrap now. Retry may
// help, unless the error wraps [kms.ErrUnwrap].
type SealedError struct {
	Wrapping string // BACKEND/PATH
	Err      error
}

func (e *SealedError) Error() string {
	s := fmt.Sprintf("the master key can't be unwrapped with %s: %s", e.Wrapping, e.Err)
	if errors.Is(e.Err, kms.ErrUnwrap) {
		s += ": name the key that wrapped it in [master-key], or restore the store from a backup"
	}
	return s
}

func (e *SealedError) Unwrap() error { return e.Err }

// call calls do with the KMS.
func (w *Wrapping) call(ctx context.Context, do func(context.Context, kms.Wrapper) error) error {
	backend, err := w.Open()
	if err != nil {
		return fmt.Errorf("backends.%s: %w", w.Backend, err)
	}
	defer backend.Close()
	wrapper, ok := backend.(kms.Wrapper)
	if !ok {
		return fmt.Errorf("backends.%s gives out keys, and does not wrap: the master key needs one that wraps, such as vault-transit", w.Backend)
	}
	ctx, cancel := context.WithTimeout(ctx, wrappingTimeout)
	defer cancel()
	if err := do(ctx, wrapper); err != nil {
		return &SealedError{w.String(), err}
	}
	return nil
}

// wrap wraps a master key, and checks that the result unwraps.
func (w *Wrapping) wrap(ctx context.Context, m *masterKey) (h Holder, err error) {
	h = Holder{Backend: w.Backend, Path: w.Path}
	err = w.call(ctx, func(ctx context.Context, k kms.Wrapper) (err error) {
		h.Version, h.Wrapped, err = k.Wrap(ctx, w.Path, m.key)
		return err
	})
	if err != nil {
		return h, err
	}
	key, err := w.unwrap(ctx, h)
	if err == nil && subtle.ConstantTimeCompare(key, m.key) != 1 {
		err = fmt.Errorf("%s unwraps another key than it has wrapped", w)
	}
	clear(key)
	return h, err
}

func (w *Wrapping) unwrap(ctx context.Context, h Holder) (key []byte, err error) {
	err = w.call(ctx, func(ctx context.Context, k kms.Wrapper) (err error) {
		key, err = k.Unwrap(ctx, h.Path, h.Version, h.Wrapped)
		if err == nil && len(key) != masterSize {
			err = fmt.Errorf("%w: it has %d bytes", kms.ErrUnwrap, len(key))
		}
		return err
	})
	return key, err
}

// unwrapFrom unwraps the first master key of a state that w has wrapped: later ones are
// handed on. None is an error.
func (w *Wrapping) unwrapFrom(ctx context.Context, state masterState) (*masterKey, error) {
	for _, e := range state.Keys {
		i := e.holder(w.String())
		if i < 0 {
			continue
		}
		key, err := w.unwrap(ctx, e.Holders[i])
		if err != nil {
			return nil, err
		}
		m, err := newMasterKey(e.Version, key)
		if err == nil && !m.isOf(e) {
			err = &SealedError{w.String(), fmt.Errorf("%w: it is the master key of another store", kms.ErrUnwrap)}
		}
		return m, err
	}
	return nil, fmt.Errorf("%w: the store has none that %s has wrapped, but those of %q: name one of them in [master-key], or run \"copilot master move\"", errNoMaster, w, state.current().names())
}

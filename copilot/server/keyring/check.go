package keyring

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"fmt"
	"time"

	"github.com/ctrlplane/pilot/copilot/kms"
)

// Trial is what trying a KEK has found.
type Trial struct {
	Version      int
	Wrap, Unwrap time.Duration // 0 if it did not come to that
}

// Try wraps a random key with the current version, and unwraps it. That is not counted
// as a wrap.
func (r *Keyring) Try(ctx context.Context, k KEK) (t Trial, err error) {
	secret := make([]byte, kms.MaxPlaintext)
	rand.Read(secret) // never fails
	defer clear(secret)
	start := time.Now()
	w, err := r.wrapUncounted(ctx, k, secret)
	t.Version, t.Wrap = w.Version, time.Since(start)
	if err != nil {
		return t, fmt.Errorf("wrap: %w", err)
	}
	start = time.Now()
	got, err := r.Unwrap(ctx, k, w)
	t.Unwrap = time.Since(start)
	defer clear(got)
	if err == nil && subtle.ConstantTimeCompare(got, secret) != 1 {
		err = fmt.Errorf("%w: the unwrapped key is not the one that was wrapped", kms.ErrUnavailable)
	}
	if err != nil {
		return t, fmt.Errorf("unwrap: %w", err)
	}
	return t, nil
}

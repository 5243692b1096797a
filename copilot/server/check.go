package server

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/policy"
)

// Check is what trying a KEK found: a random key was wrapped with its current version,
// and unwrapped. That counts neither as a wrap of the KEK nor as a client's use of it.
type Check struct {
	ID string `json:"id"`
	OK bool   `json:"ok"`
	// Backend is the KMS in which the KEK lives; empty for the broker's store.
	Backend string `json:"backend,omitempty"`
	Type    string `json:"type,omitempty"` // of the backend
	Path    string `json:"path,omitempty"` // there
	Version int    `json:"version,omitempty"`
	// How long it took, with the calls of the KMS, in milliseconds.
	WrapMillis   float64 `json:"wrapMillis,omitempty"`
	UnwrapMillis float64 `json:"unwrapMillis,omitempty"`
	// Error says what is wrong, and what to do, if OK is false.
	Error string `json:"error,omitempty"`
}

// Check tries a KEK.
func (k *Keys) Check(id string) (c Check, err error) {
	err = k.call(http.MethodPost, "/"+url.PathEscape(id)+"/check", nil, &c)
	return c, err
}

func (a *api) check(r *http.Request, e *entry) (any, error) {
	k, err := a.allowed(r.Context(), e, policy.Admin)
	if err == nil {
		err = decodeOptional(r, &struct{}{})
	}
	if err != nil {
		return nil, err
	}
	c := Check{ID: k.ID, Backend: k.Backend, Type: a.keks.types[k.Backend], Path: k.path}
	err = a.keks.try(r.Context(), k, &c)
	e.Version = c.Version
	if c.OK = err == nil; err != nil {
		// The request is answered, and the answer is what is wrong. Who may admin
		// a KEK may know.
		_, e.Verdict = statusOf(err)
		c.Error, e.Reason = err.Error(), err.Error()
	}
	return c, nil
}

// try wraps a random key and unwraps it, and notes in c what it found.
func (r *keyring) try(ctx context.Context, k kek, c *Check) error {
	secret := make([]byte, kms.MaxPlaintext)
	rand.Read(secret) // never fails
	defer clear(secret)
	start := time.Now()
	w, err := r.wrapUncounted(ctx, k, secret)
	c.Version, c.WrapMillis = w.Version, millis(start)
	if err != nil {
		return fmt.Errorf("wrap: %w", err)
	}
	start = time.Now()
	got, err := r.unwrap(ctx, k, w)
	c.UnwrapMillis = millis(start)
	defer clear(got)
	if err == nil && subtle.ConstantTimeCompare(got, secret) != 1 {
		err = fmt.Errorf("%w: it gave another key back than it was given", kms.ErrUnavailable)
	}
	if err != nil {
		return fmt.Errorf("unwrap: %w", err)
	}
	return nil
}

// millis returns how long it is since start, to the microsecond.
func millis(start time.Time) float64 {
	return float64(time.Since(start).Microseconds()) / 1000
}

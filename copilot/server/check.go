package server

import (
	"context"
	"net/http"
	"time"

	"github.com/ctrlplane/pilot/copilot/server/auditing"
	"github.com/ctrlplane/pilot/copilot/server/keyring"
)

// Check is what trying a KEK has found: a random key was wrapped with its current version,
// and unwrapped. That counts neither as a wrap of the KEK nor as a use of it.
type Check struct {
	ID string `json:"id"`
	OK bool   `json:"ok"`
	// Backend is the KMS that holds the KEK; empty for the broker's store.
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

func (a *api) check(r *http.Request, e *auditing.Entry, k keyring.KEK) (any, error) {
	if err := decodeOptional(r, &struct{}{}); err != nil {
		return nil, err
	}
	return a.checkKEK(r.Context(), e, k)
}

func (a *api) checkKEK(ctx context.Context, e *auditing.Entry, k keyring.KEK) (Check, error) {
	t, err := a.keks.Try(ctx, k)
	e.Version = t.Version
	c := Check{
		ID: k.ID, OK: err == nil, Backend: k.Backend, Type: a.keks.Type(k), Path: k.Path, Version: t.Version,
		WrapMillis: millis(t.Wrap), UnwrapMillis: millis(t.Unwrap),
	}
	if err != nil {
		// The request succeeds, and the answer is what is wrong: an admin may know.
		_, e.Verdict = statusOf(err)
		c.Error, e.Reason = err.Error(), err.Error()
	}
	return c, nil
}

// millis returns a duration in milliseconds, to the microsecond.
func millis(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

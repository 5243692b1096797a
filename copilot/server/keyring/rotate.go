package server

import (
	"context"
	"errors"
	"fmt"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/kms"
)

// current returns the current version's key, to wrap n keys with, which it
// counts. A version that has wrapped as many as it may is rotated first.
func (r *keyring) current(ctx context.Context, k kek, n int64) ([]byte, int, error) {
	for range 3 {
		key, version, err := r.key(ctx, k, 0)
		if err != nil {
			return nil, 0, err
		}
		over, err := r.count(ctx, k, version, n)
		if err == nil && !over {
			return key, version, nil
		}
		clear(key)
		if err == nil {
			err = r.rotateFull(ctx, k, version)
		}
		if err != nil {
			return nil, 0, err
		}
		rotated, err := r.find(ctx, k.ID)
		if err != nil {
			return nil, 0, err
		}
		k.KEK = rotated.KEK
	}
	return nil, 0, fmt.Errorf("%w: others rotate the KEK at the same time", keystore.ErrUnavailable)
}

// count counts n keys that a version wraps, and reports whether they are too
// many. It warns from three quarters on.
func (r *keyring) count(ctx context.Context, k kek, version int, n int64) (over bool, err error) {
	sum, err := r.store.Count(ctx, k.ID, version, n, r.limit)
	if err != nil {
		return false, err
	}
	r.metrics.wraps(k.ID, version, sum)
	if sum > r.limit/4*3 && r.firstWarning(k.ID, version) {
		logrus.WithFields(logrus.Fields{"kek": k.ID, "version": version, "wraps": sum, "limit": r.limit}).Warn("KEK comes near the number of keys that it may wrap: rotate it")
	}
	return sum > r.limit, nil
}

func (r *keyring) firstWarning(id string, version int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	key := fmt.Sprintf("%d %s", version, id)
	if r.warned == nil {
		r.warned = make(map[string]bool)
	}
	was := r.warned[key]
	r.warned[key] = true
	return !was
}

// rotateFull rotates a KEK whose current version has wrapped enough.
func (r *keyring) rotateFull(ctx context.Context, k kek, version int) error {
	// Others have seen that it is full, too.
	r.rotating.Lock()
	defer r.rotating.Unlock()
	if r.full[k.ID] >= version {
		return nil
	}
	e := &entry{Entry: audit.Entry{Action: "rotate", KEK: k.ID, Who: "copilot", From: "copilot", Verdict: audit.Allowed,
		Reason: fmt.Sprintf("version %d has wrapped as many keys as it may, %d, the last for %s", version, r.limit, k.who)}}
	_, err := r.rotate(ctx, k, version, e)
	if errors.Is(err, keystore.ErrState) {
		return nil // another replica was first
	}
	if errors.Is(err, kms.ErrForbidden) {
		err = fmt.Errorf("%w: %w", errLimit, err)
	}
	if err != nil {
		_, e.Verdict = statusOf(err)
		e.Reason += ": " + err.Error()
	}
	if err != nil || !e.written {
		err = errors.Join(err, r.audit.Write(e.Entry))
	}
	if err == nil {
		if r.full == nil {
			r.full = make(map[string]int)
		}
		r.full[k.ID] = version
		logrus.WithFields(logrus.Fields{"kek": k.ID, "version": version}).Warn("KEK rotated: it has wrapped as many keys as it may")
	}
	return err
}

// rotate makes a new version, unless from is not 0 and no longer the current
// one, and logs e before.
func (r *keyring) rotate(ctx context.Context, k kek, from int, e *entry) (kek, error) {
	if k.backend == nil {
		var err error
		k.KEK, err = r.store.Rotate(ctx, k.ID, from, k.change(r.beforeVersion(e)))
		return k, err
	}
	rotator, ok := k.backend.(kms.Rotator)
	if !ok {
		if from != 0 {
			return k, errLimit
		}
		return k, fmt.Errorf("%w: copilot can't rotate keys in %s: rotate it there", keystore.ErrState, k.Backend)
	}
	// What will be made is known only afterwards.
	if err := r.before(e)(k.KEK); err != nil {
		return k, err
	}
	var version int
	err := r.call(ctx, k, "rotate", func(ctx context.Context) (err error) {
		version, err = rotator.Rotate(ctx, k.path)
		return err
	})
	e.Version = version
	e.written = false // again, with the version or what went wrong
	return k, err
}

// before returns what writes e down as done right before a change is made.
func (r *keyring) before(e *entry) func(keystore.KEK) error {
	return func(keystore.KEK) error {
		if err := r.audit.Write(e.Entry); err != nil {
			return err
		}
		e.written = true
		return nil
	}
}

// beforeVersion does so for a change that makes a version, which it notes in e.
func (r *keyring) beforeVersion(e *entry) func(keystore.KEK) error {
	return func(k keystore.KEK) error {
		e.Version = k.Current()
		return r.before(e)(k)
	}
}

// entry is an audit entry that is being made.
type entry struct {
	audit.Entry
	written bool // as what was done, which may yet fail
}

package keyring

import (
	"context"
	"errors"
	"fmt"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/server/auditing"
)

// Current returns the current version's key, to wrap n keys with, and counts those. A
// version that has wrapped as many as it may is rotated first. The caller clears the key.
func (r *Keyring) Current(ctx context.Context, k KEK, n int64) ([]byte, int, error) {
	for range 3 {
		key, version, err := r.Key(ctx, k, 0)
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
		rotated, err := r.Find(ctx, k.ID)
		if err != nil {
			return nil, 0, err
		}
		k.KEK = rotated.KEK
	}
	return nil, 0, fmt.Errorf("%w: others are rotating the KEK at the same time", keystore.ErrUnavailable)
}

// count counts n keys that a version wraps, and reports whether it has reached its limit.
// It warns from three quarters of that.
func (r *Keyring) count(ctx context.Context, k KEK, version int, n int64) (over bool, err error) {
	sum, err := r.Store.Count(ctx, k.ID, version, n, r.limit)
	if err != nil {
		return false, err
	}
	r.metrics.wraps(k.ID, version, sum)
	if sum > r.limit/4*3 && r.firstWarning(k.ID, version) {
		logrus.WithFields(logrus.Fields{"kek": k.ID, "version": version, "wraps": sum, "limit": r.limit}).Warn("KEK has wrapped nearly as many keys as it may: rotate it")
	}
	return sum > r.limit, nil
}

func (r *Keyring) firstWarning(id string, version int) bool {
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

// rotateFull rotates a KEK whose current version has reached its limit.
func (r *Keyring) rotateFull(ctx context.Context, k KEK, version int) error {
	// Concurrent callers have noticed, too.
	select {
	case r.rotating <- struct{}{}:
		defer func() { <-r.rotating }()
	case <-ctx.Done():
		return fmt.Errorf("%w: wait for the rotation of another KEK: %w", kms.ErrUnavailable, ctx.Err())
	}
	if r.full[k.ID] >= version {
		return nil
	}
	e := &auditing.Entry{Entry: audit.Entry{Action: "rotate", KEK: k.ID, Who: "copilot", From: "copilot", Verdict: audit.Allowed,
		Reason: fmt.Sprintf("version %d has wrapped as many keys as it may, %d, the last for %s", version, r.limit, k.Who)}}
	_, err := r.Rotate(ctx, k, version, e)
	if errors.Is(err, keystore.ErrState) {
		return nil // another replica was first
	}
	if errors.Is(err, kms.ErrForbidden) {
		err = fmt.Errorf("%w: %w", ErrLimit, err)
	}
	if err != nil {
		e.Verdict = Verdict(err)
		e.Reason += ": " + err.Error()
	}
	if err != nil || !e.Written() {
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

// Rotate makes a new version, unless from is not 0 and no longer the current version, and
// writes e to the audit log before.
func (r *Keyring) Rotate(ctx context.Context, k KEK, from int, e *auditing.Entry) (KEK, error) {
	if k.backend == nil {
		var err error
		k.KEK, err = r.Store.Rotate(ctx, k.ID, from, k.Change(r.BeforeVersion(e)))
		return k, err
	}
	rotator, ok := k.backend.(kms.Rotator)
	if !ok {
		if from != 0 {
			return k, ErrLimit
		}
		return k, fmt.Errorf("%w: copilot can't rotate keys in %s: rotate it there", keystore.ErrState, k.Backend)
	}
	// The version is known only afterwards.
	if err := r.Before(e)(k.KEK); err != nil {
		return k, err
	}
	var version int
	err := r.call(ctx, k, "rotate", func(ctx context.Context) (err error) {
		version, err = rotator.Rotate(ctx, k.Path)
		return err
	})
	e.Version = version
	e.Changed() // with the version, or what failed
	return k, err
}

// Before returns what writes e to the audit log right before a change is made.
func (r *Keyring) Before(e *auditing.Entry) func(keystore.KEK) error {
	return func(keystore.KEK) error { return r.audit.WriteAhead(e) }
}

// BeforeVersion is [Keyring.Before] for a change that makes a version, which it notes in e.
func (r *Keyring) BeforeVersion(e *auditing.Entry) func(keystore.KEK) error {
	return func(k keystore.KEK) error {
		e.Version = k.Current()
		return r.Before(e)(k)
	}
}

package keystore

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"time"
)

// KEK is what the store has of a KEK.
type KEK struct {
	ID string
	record
	by *masterKey // that seals it
}

// record is how a KEK is stored.
type record struct {
	Backend  string    `json:"backend,omitempty"` // empty: its keys are here
	Disabled bool      `json:"disabled,omitempty"`
	Revoked  []string  `json:"revoked,omitempty"`  // identities
	Versions []Version `json:"versions,omitempty"` // in order; the last one is current
}

// State of a version.
type State string

// A version that is enabled wraps, if it is the current one, and unwraps. A
// disabled one does not until it is enabled. One that is to be destroyed can
// still be enabled; one that is destroyed has no key any more.
const (
	Enabled    State = "enabled"
	Disabled   State = "disabled"
	Destroying State = "destroying"
	Destroyed  State = "destroyed"
)

// Version is one version of a KEK.
type Version struct {
	Version   int       `json:"version"` // from 1
	Created   time.Time `json:"created,omitzero"`
	Bits      int       `json:"bits,omitempty"`
	State     State     `json:"state,omitempty"` // empty: enabled
	DestroyAt time.Time `json:"destroyAt,omitzero"`
	Sealed    []byte    `json:"sealed,omitempty"` // 12-byte nonce, key, 16-byte tag
}

// In returns the state at the time now: a version whose time has come is
// destroyed, whether its key is gone already or not.
func (v Version) In(now time.Time) State {
	switch {
	case v.State == "":
		return Enabled
	case v.State == Destroying && !now.Before(v.DestroyAt):
		return Destroyed
	}
	return v.State
}

// Current returns the number of the current version, or 0 if none is known.
func (k KEK) Current() int {
	if len(k.Versions) == 0 {
		return 0
	}
	return k.Versions[len(k.Versions)-1].Version
}

// Version returns what is known of a version; the current one if n is 0.
func (k KEK) Version(n int) (Version, bool) {
	if n == 0 {
		n = k.Current()
	}
	i := slices.IndexFunc(k.Versions, func(v Version) bool { return v.Version == n })
	if i < 0 {
		return Version{}, false
	}
	return k.Versions[i], true
}

// CheckUse returns nil if a version may be used; the current one if version is
// 0, which is known only of KEKs that live here. Errors wrap [ErrNotFound] or
// [ErrDisabled].
func (s *Store) CheckUse(k KEK, version int) error {
	if k.Disabled {
		return fmt.Errorf("%w", ErrDisabled)
	}
	if k.Backend != "" && version == 0 {
		return nil
	}
	v, ok := k.Version(version)
	if !ok {
		if k.Backend != "" {
			return nil // nothing was ever said of it
		}
		return fmt.Errorf("%w %d", ErrNoVersion, version)
	}
	switch v.In(s.now()) {
	case Enabled:
		return nil
	case Destroyed:
		return fmt.Errorf("%w %d: it was destroyed", ErrNoVersion, v.Version)
	case Destroying:
		return fmt.Errorf("%w: version %d is to be destroyed on %s", ErrDisabled, v.Version, v.DestroyAt.Format(time.RFC3339))
	}
	return fmt.Errorf("%w: version %d", ErrDisabled, v.Version)
}

// Key returns the key of a version of a KEK that lives here, and the version;
// the current one if version is 0. The caller clears the key.
func (s *Store) Key(k KEK, version int) ([]byte, int, error) {
	if err := s.CheckUse(k, version); err != nil {
		return nil, 0, err
	}
	v, ok := k.Version(version)
	if !ok {
		return nil, 0, ErrNotFound
	}
	key, err := k.open(v)
	return key, v.Version, err
}

// versionPlace is what a sealed version is bound to.
func versionPlace(id string, version int) []byte {
	return fmt.Appendf(nil, "kek %d %s", version, id)
}

// Create makes a KEK with version 1, a new random key of 32 bytes, or key, of
// 16, 24 or 32 bytes, if that is not nil.
func (s *Store) Create(ctx context.Context, id string, key []byte, c Change) (KEK, error) {
	if key == nil {
		key = newKey()
		defer clear(key)
	}
	switch len(key) {
	case 16, 24, KeySize:
	default:
		return KEK{}, fmt.Errorf("%w: the key to import has %d bytes, not 32 (or 16 or 24, for the original's format only)", ErrInput, len(key))
	}
	return s.update(ctx, id, c, func(k *KEK) error {
		if k.allDestroyed(s.now()) {
			return fmt.Errorf("%w, and it was destroyed: take another name, since images may still refer to this one", ErrExists)
		}
		if k.Backend != "" {
			return fmt.Errorf("%w, and it lived in %s: take another name, since images may still refer to this one", ErrExists, k.Backend)
		}
		if len(k.Versions) > 0 {
			return ErrExists
		}
		k.add(key, s.now())
		return nil
	})
}

// Rotate gives the KEK a new version, of 32 random bytes, to wrap with. What was
// wrapped with older ones still unwraps. If from is not 0 and no longer the current
// version, another caller has rotated it, and nothing changes.
func (s *Store) Rotate(ctx context.Context, id string, from int, c Change) (KEK, error) {
	key := newKey()
	defer clear(key)
	return s.update(ctx, id, c, func(k *KEK) error {
		switch {
		case len(k.Versions) == 0 || k.allDestroyed(s.now()):
			return ErrNotFound
		case from != 0 && from != k.Current():
			return fmt.Errorf("%w: version %d is current by now", ErrState, k.Current())
		}
		k.add(key, s.now())
		return nil
	})
}

func newKey() []byte {
	key := make([]byte, KeySize)
	rand.Read(key) // never fails
	return key
}

func (k *KEK) add(key []byte, now time.Time) {
	version := k.Current() + 1
	k.Versions = append(k.Versions, Version{
		Version: version,
		Created: now.UTC().Truncate(time.Second),
		Bits:    8 * len(key),
		Sealed:  k.by.sealFor(versionPlace(k.ID, version), key),
	})
}

func (k KEK) allDestroyed(now time.Time) bool {
	return len(k.Versions) > 0 && !slices.ContainsFunc(k.Versions, func(v Version) bool { return v.In(now) != Destroyed })
}

// Disable stops a version from being used, or the whole KEK if version is 0,
// until it is enabled.
func (s *Store) Disable(ctx context.Context, id string, version int, c Change) (KEK, error) {
	return s.update(ctx, id, c, func(k *KEK) error {
		if version == 0 {
			if len(k.Versions) == 0 && k.Backend == "" {
				return ErrNotFound
			}
			k.Disabled = true
			return nil
		}
		return k.change(version, func(v *Version) error {
			if s := v.In(s.now()); s == Destroyed || s == Destroying {
				return fmt.Errorf("%w: version %d is %s", ErrState, version, s)
			}
			v.State = Disabled
			return nil
		})
	})
}

// Enable undoes Disable, and Destroy before its time has come, of a version or,
// if version is 0, of the whole KEK: then versions that were disabled or are to
// be destroyed by themselves stay so.
func (s *Store) Enable(ctx context.Context, id string, version int, c Change) (KEK, error) {
	return s.update(ctx, id, c, func(k *KEK) error {
		if version != 0 {
			return k.change(version, func(v *Version) error {
				if v.In(s.now()) == Destroyed {
					return fmt.Errorf("%w: version %d was destroyed", ErrState, version)
				}
				v.State, v.DestroyAt = "", time.Time{}
				return nil
			})
		}
		if len(k.Versions) == 0 && k.Backend == "" || k.allDestroyed(s.now()) {
			return ErrNotFound
		}
		k.Disabled = false
		if slices.ContainsFunc(k.Versions, func(v Version) bool { s := v.In(s.now()); return s == Enabled || s == Disabled }) {
			return nil // it was not the whole KEK that was to be destroyed
		}
		for i := range k.Versions {
			if v := &k.Versions[i]; v.In(s.now()) == Destroying {
				v.State, v.DestroyAt = "", time.Time{}
			}
		}
		return nil
	})
}

// Destroy stops a version from being used, or all if version is 0, and forgets its key
// at the time given. Keys that were wrapped with it can then never be unwrapped.
func (s *Store) Destroy(ctx context.Context, id string, version int, at time.Time, c Change) (KEK, error) {
	return s.update(ctx, id, c, func(k *KEK) error {
		if k.Backend != "" {
			return fmt.Errorf("%w: the key lives in %s: destroy it there", ErrState, k.Backend)
		}
		if len(k.Versions) == 0 {
			return ErrNotFound
		}
		destroy := func(v *Version) error {
			if v.In(s.now()) == Destroyed {
				return nil
			}
			v.State, v.DestroyAt = Destroying, at.UTC().Truncate(time.Second)
			s.forget(v)
			return nil
		}
		if version != 0 {
			return k.change(version, destroy)
		}
		for i := range k.Versions {
			destroy(&k.Versions[i])
		}
		return nil
	})
}

// forget removes the key of a version whose time has come.
func (s *Store) forget(v *Version) bool {
	if v.State != Destroying || v.In(s.now()) != Destroyed {
		return false
	}
	v.State, v.Sealed = Destroyed, nil
	return true
}

// Sweep removes the keys of versions whose time has come, of those that the last check has
// seen ([Store.CheckChanged]). log is called with each KEK that changes, and with those
// versions. A record that is damaged or was put back is an error, but does not end the sweep.
func (s *Store) Sweep(ctx context.Context, log func(k KEK, versions []int) error) error {
	ids, damaged := s.due()
	for _, id := range ids {
		var gone []int
		_, err := s.update(ctx, id, Change{Log: func(k KEK) error { return log(k, gone) }}, func(k *KEK) error {
			gone = nil // it is called again if the change has to be made again
			for i := range k.Versions {
				if s.forget(&k.Versions[i]) {
					gone = append(gone, k.Versions[i].Version)
				}
			}
			if gone == nil {
				return errNothing // another broker did it
			}
			return nil
		})
		if errors.Is(err, ErrRolledBack) || errors.Is(err, errDamaged) {
			damaged = errors.Join(damaged, err)
			continue
		}
		if err != nil && err != errNothing {
			return errors.Join(err, damaged)
		}
	}
	return damaged
}

var errNothing = fmt.Errorf("%w: there is nothing to do", ErrState)

// Revoke denies the KEK to one identity, whatever the policy says. Reinstate undoes
// that.
func (s *Store) Revoke(ctx context.Context, id, identity string, c Change) (KEK, error) {
	return s.update(ctx, id, c, func(k *KEK) error {
		if len(k.Versions) == 0 && k.Backend == "" {
			return ErrNotFound
		}
		if identity == "" || len(identity) > 1024 {
			return fmt.Errorf("%w: an identity has 1 to 1024 characters", ErrInput)
		}
		if !slices.Contains(k.Revoked, identity) {
			k.Revoked = append(k.Revoked, identity)
		}
		return nil
	})
}

// Reinstate undoes Revoke.
func (s *Store) Reinstate(ctx context.Context, id, identity string, c Change) (KEK, error) {
	return s.update(ctx, id, c, func(k *KEK) error {
		i := slices.Index(k.Revoked, identity)
		if i < 0 {
			return fmt.Errorf("%w: the KEK was not revoked for %.200q", ErrState, identity)
		}
		k.Revoked = slices.Delete(k.Revoked, i, i+1)
		return nil
	})
}

// change changes what is known of a version. One of a KEK that lives elsewhere
// need not be known.
func (k *KEK) change(version int, do func(*Version) error) error {
	i := slices.IndexFunc(k.Versions, func(v Version) bool { return v.Version == version })
	if i < 0 && k.Backend != "" && version > 0 {
		k.Versions = append(k.Versions, Version{Version: version})
		slices.SortFunc(k.Versions, func(a, b Version) int { return a.Version - b.Version })
		i = slices.IndexFunc(k.Versions, func(v Version) bool { return v.Version == version })
	}
	if i < 0 {
		return fmt.Errorf("%w %d", ErrNoVersion, version)
	}
	return do(&k.Versions[i])
}

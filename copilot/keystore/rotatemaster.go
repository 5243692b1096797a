package keystore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// A rotation of the master key has these steps. Each can be done again, by any copilot
// that has the store open:
//
//  1. A new master key is made, and handed on: sealed under the current one in the
//     database. All copilots seal under it from then on.
//  2. Everything is sealed under it again, some records at a time.
//  3. Once nothing is sealed under the one before, each holder of that takes over: its
//     KMS wraps the new one, or its file is replaced.
//  4. Once all have, the one before is dropped, and with it what it has handed on.

// resealBatch is how many records are sealed again in one transaction.
const resealBatch = 32

// MasterStatus says where the master keys of a store are.
type MasterStatus struct {
	// Source is where this copilot has the master key from: a file, or BACKEND/PATH.
	Source  string `json:"source"`
	Current int    `json:"current"` // version
	// Rotating says that the master key before the current one is still there.
	Rotating bool `json:"rotating"`
	// Resealed says that nothing is sealed under the one before any more.
	Resealed bool              `json:"resealed,omitempty"`
	Keys     []MasterKeyStatus `json:"keys"`
	Waiting  []string          `json:"waiting,omitempty"` // holders that have to take over
	Damaged  []string          `json:"damaged,omitempty"` // KEKs that no master key opens
}

// MasterKeyStatus is the status of one master key.
type MasterKeyStatus struct {
	Version int       `json:"version"`
	Created time.Time `json:"created,omitzero"`
	Holders []string  `json:"holders"`
	Records int       `json:"records"` // KEKs that are sealed under it
}

// holderName is the name under which this copilot holds the master key. A copilot whose
// store is a file is its only holder, and need not be known by name.
func (s *Store) holderName() string {
	if s.wrapping != nil {
		return s.wrapping.String()
	}
	return s.fileHolder().String()
}

func (s *Store) fileHolder() Holder { return Holder{File: AuditLogName(s.dir, true)} }

// canReplace reports whether this copilot can replace its master key.
func (s *Store) canReplace() error {
	if name := masterCredentialFile(); name != "" && s.source == name {
		return fmt.Errorf("%w: the master key is the credential %s, which copilot can't replace: put it into the file master.key, or move it to a KMS (copilot master move)", ErrState, name)
	}
	return nil
}

// keepMasters changes what the store keeps of its master keys.
func (s *Store) keepMasters(ctx context.Context, change func(set *masterSet, state *masterState) error) error {
	return s.current(ctx, func() error {
		var next []byte
		err := s.db.keep(ctx, masterName, func(old, _ []byte) ([]byte, error) {
			set, err := s.follow(old)
			if err != nil {
				return nil, err
			}
			state := set.state
			state.Keys = slices.Clone(state.Keys)
			for i := range state.Keys {
				state.Keys[i].Holders = slices.Clone(state.Keys[i].Holders)
			}
			if err := change(set, &state); err != nil {
				return nil, err
			}
			next, err = set.sealState(state)
			return next, err
		})
		if err == nil {
			_, err = s.follow(next)
		}
		return err
	})
}

// HoldMaster notes that this copilot, which serves a store that others share, has the
// master key in a file: a rotation waits until it has the new one.
func (s *Store) HoldMaster(ctx context.Context) error {
	if !s.shared || s.wrapping != nil || s.canReplace() != nil {
		return nil
	}
	set := s.masters.Load()
	name := s.holderName()
	if slices.ContainsFunc(set.state.Keys, func(e masterEntry) bool { return e.holder(name) >= 0 }) {
		return nil
	}
	return s.keepMasters(ctx, func(_ *masterSet, state *masterState) error {
		// Its file has the first one that it knows.
		for i := range state.Keys {
			if e := &state.Keys[i]; set.known[e.Version] != nil {
				if e.holder(name) < 0 {
					e.Holders = append(e.Holders, s.fileHolder())
				}
				return nil
			}
		}
		return nil
	})
}

// RotateMaster begins a rotation: it makes a new master key, and returns its version. log
// is called right before. The error wraps [ErrState] if a rotation is in progress.
func (s *Store) RotateMaster(ctx context.Context, log func(version int) error) (version int, err error) {
	if err := s.canReplace(); err != nil {
		return 0, err
	}
	var check []byte
	err = s.keepMasters(ctx, func(set *masterSet, state *masterState) error {
		if state.rotating() {
			return fmt.Errorf("%w: a rotation to master key %d is in progress: see \"copilot master status\"", ErrState, state.current().Version)
		}
		m, err := randomMaster(set.current.version + 1)
		if err != nil {
			return err
		}
		if err := log(m.version); err != nil {
			return err
		}
		e := newMasterEntry(m)
		e.Handed = set.current.sealFor(handedPlace(m.version), m.key)
		e.Audit = m.sealFor([]byte(auditPlace), set.audit)
		state.Keys, state.Resealed = append(state.Keys, e), false
		version, check = m.version, e.Check
		return nil
	})
	if err != nil {
		return 0, err
	}
	// Copilots that know of no rotations must not take their master key for the right one.
	return version, s.keepCheck(ctx, check)
}

// readSet returns the master keys as the store has them now.
func (s *Store) readSet(ctx context.Context) (set *masterSet, err error) {
	err = s.current(ctx, func() error {
		raw, _, err := s.readMasters(ctx)
		if err == nil && raw == nil {
			set = s.masters.Load()
		} else if err == nil {
			set, err = s.follow(raw)
		}
		return err
	})
	return set, err
}

// ResealMaster goes on with a rotation, from where it was interrupted, as far as it can:
// what is sealed under the old master key is sealed under the new one, and this copilot's
// holder takes over. It reports whether the rotation is done, and drops the old master key
// then; log is called before that, of all copilots in one. pause is called after each batch
// with the time that it took.
func (s *Store) ResealMaster(ctx context.Context, pause func(time.Duration), log func(version int) error) (done bool, err error) {
	set, err := s.readSet(ctx)
	if err != nil || !set.state.rotating() {
		return err == nil, err
	}
	if !set.state.Resealed {
		if err := s.resealRecords(ctx, set.current, pause); err != nil {
			return false, err
		}
		if err := s.resealHeads(ctx); err != nil {
			return false, err
		}
		status, err := s.MasterStatus(ctx)
		if err != nil {
			return false, err
		}
		if n := status.left(); n > 0 || len(status.Damaged) > 0 {
			return false, fmt.Errorf("%w: %d records are still sealed under master key %d, of which %d are damaged, such as %q: the old master key is kept", ErrState, n+len(status.Damaged), set.current.version-1, len(status.Damaged), status.Damaged[:min(len(status.Damaged), 3)])
		}
		version := set.current.version
		if err := s.keepMasters(ctx, func(_ *masterSet, state *masterState) error {
			if state.current().Version == version {
				state.Resealed = true
			}
			return nil
		}); err != nil {
			return false, err
		}
	}
	if err := s.takeOver(ctx); err != nil {
		return false, err
	}
	return s.dropMaster(ctx, log)
}

// left is how many records are sealed under a master key that is not the current one.
func (m MasterStatus) left() (n int) {
	for _, k := range m.Keys {
		if k.Version != m.Current {
			n += k.Records
		}
	}
	return n
}

func (s *Store) resealRecords(ctx context.Context, to *masterKey, pause func(time.Duration)) error {
	for after := ""; ; {
		start := time.Now()
		last, err := s.db.reseal(ctx, after, resealBatch, func(id string, b []byte) ([]byte, error) {
			var outer stored
			if json.Unmarshal(b, &outer) == nil && outer.Master == to.version {
				return nil, nil
			}
			// A damaged record stays as it is, and so does the old master key.
			k, err := s.decode(id, b)
			if errors.As(err, new(*missingMaster)) {
				return nil, err
			}
			if err != nil || k.renew(to) != nil {
				return nil, nil
			}
			return s.encode(k)
		})
		if err != nil || last == "" {
			return err
		}
		after = last
		pause(time.Since(start))
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

func (s *Store) resealHeads(ctx context.Context) error {
	var names []string
	err := s.db.named(ctx, auditHead, func(name string, _ []byte) error {
		names = append(names, name)
		return nil
	})
	if err != nil {
		return err
	}
	for _, name := range names {
		err := s.current(ctx, func() error {
			return s.db.keep(ctx, name, func(old, master []byte) ([]byte, error) {
				set, err := s.follow(master)
				if err != nil {
					return nil, err
				}
				_, by, err := set.openHead(name, old)
				if err != nil || by == set.current {
					return old, nil // a changed one is reported where it is read
				}
				b, err := by.openFor([]byte(name), old)
				if err != nil {
					return nil, err
				}
				return set.current.sealFor([]byte(name), b), nil
			})
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// takeOver has this copilot's holder hold the new master key.
func (s *Store) takeOver(ctx context.Context) error {
	set := s.masters.Load()
	name := s.holderName()
	if !set.state.rotating() || !set.state.Resealed || set.state.current().holder(name) >= 0 {
		return nil
	}
	h := s.fileHolder()
	if s.wrapping != nil {
		// A TPM that would not unseal the old one now, as its PCRs have changed, would seal
		// the new one to what they are.
		var err error
		if i := set.state.Keys[0].holder(name); i >= 0 {
			var old []byte
			old, err = s.wrapping.unwrap(ctx, set.state.Keys[0].Holders[i])
			clear(old)
		}
		if err == nil {
			h, err = s.wrapping.wrap(ctx, set.current)
		}
		if err != nil {
			return err
		}
	} else {
		if err := s.canReplace(); err != nil {
			return err
		}
		if err := s.replaceFile(set); err != nil {
			return err
		}
	}
	return s.keepMasters(ctx, func(now *masterSet, state *masterState) error {
		if now.current.version == set.current.version && state.current().holder(name) < 0 {
			e := state.current()
			e.Holders = append(e.Holders, h)
		}
		return nil
	})
}

// replaceFile writes the current master key to this copilot's file, and reads it back.
func (s *Store) replaceFile(set *masterSet) error {
	name := s.dir + string(os.PathSeparator) + masterFile
	if err := writeMaster(name, set.fileBytes()); err != nil {
		return err
	}
	b, err := readMaster(name, 0o077, "chmod 0600 it")
	if err == nil && !bytes.Equal(b, set.fileBytes()) {
		err = fmt.Errorf("%s was not written as it is", name)
	}
	return err
}

// waiting are the holders of the old master key that have to take over, this copilot's
// among them. A store that is a file has no other.
func (s *Store) waiting(state masterState) (names []string) {
	if !state.rotating() {
		return nil
	}
	names = []string{s.holderName()}
	if s.shared {
		names = append(names, state.Keys[0].names()...)
	}
	slices.Sort(names)
	return slices.DeleteFunc(slices.Compact(names), func(name string) bool { return state.current().holder(name) >= 0 })
}

// dropMaster drops the old master key, if nothing needs it any more.
func (s *Store) dropMaster(ctx context.Context, log func(version int) error) (done bool, err error) {
	err = s.keepMasters(ctx, func(set *masterSet, state *masterState) error {
		done = !state.rotating()
		if done || !state.Resealed || len(s.waiting(*state)) > 0 {
			return nil
		}
		if err := log(state.current().Version); err != nil {
			return err
		}
		e := *state.current()
		e.Handed = nil
		if !s.shared && s.wrapping == nil {
			e.Holders = nil
		}
		state.Keys, state.Resealed, done = []masterEntry{e}, false, true
		return nil
	})
	if err != nil || !done {
		return false, err
	}
	return true, s.keepCheck(ctx, s.masters.Load().state.current().Check)
}

// RotationStatus is [Store.MasterStatus] without what takes reading records.
func (s *Store) RotationStatus(ctx context.Context) (MasterStatus, error) {
	set, err := s.readSet(ctx)
	if err != nil {
		return MasterStatus{}, err
	}
	m := MasterStatus{Source: s.source, Current: set.current.version, Rotating: set.state.rotating(), Resealed: set.state.Resealed, Waiting: s.waiting(set.state)}
	for _, e := range set.state.Keys {
		m.Keys = append(m.Keys, MasterKeyStatus{Version: e.Version, Created: e.Created, Holders: e.names()})
	}
	return m, nil
}

// MasterStatus reads all records and reports which master key seals how many.
func (s *Store) MasterStatus(ctx context.Context) (MasterStatus, error) {
	m, err := s.RotationStatus(ctx)
	if err != nil {
		return m, err
	}
	records := make(map[int]int)
	err = s.each(ctx, All, func(k KEK, err error) {
		if err != nil {
			m.Damaged = append(m.Damaged, k.ID)
			return
		}
		records[k.by.version]++
	})
	for i := range m.Keys {
		m.Keys[i].Records = records[m.Keys[i].Version]
	}
	return m, err
}

// ForgetHolder forgets a holder of the master key, by its name: it is gone, or not to
// have it any more. This copilot's own is an error. log is called right before.
func (s *Store) ForgetHolder(ctx context.Context, name string, log func() error) error {
	if name == s.holderName() {
		return fmt.Errorf("%w: this copilot has the master key from %s: move it elsewhere first (copilot master move)", ErrState, name)
	}
	return s.keepMasters(ctx, func(_ *masterSet, state *masterState) error {
		found := false
		for i := range state.Keys {
			if at := state.Keys[i].holder(name); at >= 0 {
				state.Keys[i].Holders = slices.Delete(state.Keys[i].Holders, at, at+1)
				found = true
			}
		}
		if !found {
			return fmt.Errorf("%w: the store knows no holder %.200q, but %s", ErrInput, name, strings.Join(state.current().names(), ", "))
		}
		return log()
	})
}

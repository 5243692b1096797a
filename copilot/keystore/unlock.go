package keystore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// errBothMasters says that copilot.toml names a KMS, and there is a file too.
const errBothMasters = "copilot.toml has [master-key], and %s exists: \"copilot master move\" wraps the master key with %s and removes the file; to keep the file instead, remove [master-key]"

// unlock loads the master keys, or makes the first one if the store is new.
func (s *Store) unlock(ctx context.Context) error {
	if s.wrapping != nil {
		if name := masterFileIn(s.dir); name != "" {
			return fmt.Errorf(errBothMasters, name, s.wrapping)
		}
	}
	raw, check, err := s.readMasters(ctx)
	if err != nil {
		return err
	}
	if raw == nil && check == nil {
		if s.wrapping != nil {
			return s.makeWrapped(ctx)
		}
		if check, err = s.makeCheck(ctx); err != nil {
			return err
		}
	}
	if err := s.load(ctx, raw, check); err != nil || raw == nil || !s.masters.Load().unsigned() {
		return err
	}
	// An earlier copilot wrote it.
	return s.keepMasters(ctx, func(*masterSet, *masterState) error { return nil })
}

// masterFileIn returns the file or the credential that has the master key, or "" if there
// is none.
func masterFileIn(dir string) string {
	for _, name := range []string{masterCredentialFile(), filepath.Join(dir, masterFile)} {
		if name == "" {
			continue
		}
		if _, err := os.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
			return name
		}
	}
	return ""
}

// readMasters returns what the store keeps of its master keys, and the check of the first.
// Both are nil if it is new.
func (s *Store) readMasters(ctx context.Context) (raw, check []byte, err error) {
	if raw, err = s.readNamed(ctx, masterName); err == nil {
		check, err = s.readNamed(ctx, masterCheck)
	}
	return raw, check, err
}

// readNamed returns what is kept under a name, or nil.
func (s *Store) readNamed(ctx context.Context, name string) (b []byte, err error) {
	err = s.db.named(ctx, name, func(found string, value []byte) error {
		if found == name {
			b = slices.Clone(value)
		}
		return nil
	})
	return b, err
}

// load loads the master keys, and whatever they have handed on.
func (s *Store) load(ctx context.Context, raw, check []byte) error {
	state := legacyState(check)
	if raw != nil {
		var err error
		if state, err = parseMasterState(raw); err != nil {
			return err
		}
	}
	var m *masterKey
	var err error
	if s.wrapping != nil {
		s.foundIn(s.wrapping.String())
		m, err = s.wrapping.unwrapFrom(ctx, state)
	} else {
		m, err = s.masterOf(state)
	}
	if err != nil {
		return err
	}
	set, err := newMasterSet(raw, state, m)
	if err != nil {
		return err
	}
	if raw != nil && set.unsigned() {
		// Whether that is of an earlier copilot or of somebody who removed the MAC.
		b, err := s.readNamed(ctx, anchorName(anchorShards))
		if err != nil {
			return err
		}
		if a, err := set.openAnchor(anchorName(anchorShards), b); err != nil || a.Complete {
			return errMasters
		}
	}
	s.masters.Store(set)
	return nil
}

// foundIn notes where the master key is, the first time.
func (s *Store) foundIn(source string) {
	if s.source == "" {
		s.source = source
	}
}

// masterOf returns the master key in a file, which has to be one of the state's.
func (s *Store) masterOf(state masterState) (*masterKey, error) {
	b, name, err := masterFrom(s.dir, false)
	if errors.Is(err, errNoMaster) && len(state.current().Holders) > 0 {
		err = fmt.Errorf("%w; it is held by %q: [master-key] in copilot.toml names a KMS", err, state.current().names())
	}
	if err != nil {
		return nil, err
	}
	s.foundIn(name)
	for _, e := range state.Keys {
		if m, err := newMasterKey(e.Version, b.key()); err != nil || m.isOf(e) {
			return m, err
		}
	}
	if v := state.current().Version; v > 1 {
		return nil, fmt.Errorf("%w: master key %d is current; take it from another copilot of this database if this one was away during the rotation", errOtherMaster, v)
	}
	return nil, errOtherMaster
}

// makeCheck makes a new store, whose master key is a file.
func (s *Store) makeCheck(ctx context.Context) (check []byte, err error) {
	err = s.db.keep(ctx, masterCheck, func(old, _ []byte) ([]byte, error) {
		if check = old; old != nil {
			return old, nil
		}
		s.made = true
		b, _, err := masterFrom(s.dir, true)
		if err != nil {
			return nil, err
		}
		m, err := newMasterKey(1, b.key())
		if err != nil {
			return nil, err
		}
		check = m.sealFor([]byte(masterCheck), nil)
		return check, nil
	})
	return check, err
}

// makeWrapped makes a new store, whose master key a KMS has wrapped.
func (s *Store) makeWrapped(ctx context.Context) error {
	m, err := randomMaster(1)
	if err != nil {
		return err
	}
	h, err := s.wrapping.wrap(ctx, m)
	if err != nil {
		return err
	}
	e := newMasterEntry(m)
	e.Holders = []Holder{h}
	state := masterState{Format: masterFormat, Keys: []masterEntry{e}}
	set, err := newMasterSet(nil, state, m)
	if err != nil {
		return err
	}
	raw, err := set.sealState(state)
	if err != nil {
		return err
	}
	err = s.db.keep(ctx, masterName, func(old, _ []byte) ([]byte, error) {
		if s.made = old == nil; !s.made {
			raw = old // another copilot was first
		}
		return raw, nil
	})
	if err != nil {
		return err
	}
	// Copilots that know of no wrapped master keys must not take the store for new.
	if err := s.keepCheck(ctx, e.Check); err != nil {
		return err
	}
	return s.load(ctx, raw, nil)
}

func (s *Store) keepCheck(ctx context.Context, check []byte) error {
	return s.db.keep(ctx, masterCheck, func(_, _ []byte) ([]byte, error) { return check, nil })
}

// follow returns the master keys as the store keeps them, raw, by now. The error is a
// [*missingMaster] if this process can't know the current one without its holder.
func (s *Store) follow(raw []byte) (*masterSet, error) {
	before := s.masters.Load()
	set, err := before.follow(raw)
	if err == nil && set != before && set.unsigned() && (!before.unsigned() || s.anchors.complete.Load()) {
		err = errMasters
	}
	// What was read before a rotation is old.
	if err == nil && set != before && set.current.version >= before.current.version {
		s.masters.CompareAndSwap(before, set)
	}
	return set, err
}

// current calls do, and again if the master keys have changed meanwhile.
func (s *Store) current(ctx context.Context, do func() error) error {
	err := do()
	if s.catchesUp(ctx, err) {
		err = do()
	}
	return err
}

// catchesUp reports whether err is that of a master key that this process did not have,
// and has now.
func (s *Store) catchesUp(ctx context.Context, err error) bool {
	missing, ok := errors.AsType[*missingMaster](err)
	if !ok {
		return false
	}
	s.reloading.Lock()
	defer s.reloading.Unlock()
	version := missing.version
	if s.masters.Load().known[version] != nil {
		return true
	}
	if time.Since(s.missed) < reloadInterval {
		return false // there may be many such records
	}
	raw, check, err := s.readMasters(ctx)
	if err == nil {
		if _, err = s.follow(raw); errors.As(err, &missing) {
			err = s.load(ctx, raw, check)
		}
	}
	if err != nil || s.masters.Load().known[version] == nil {
		s.missed = time.Now()
		return false
	}
	return true
}

// reloadInterval is how often master keys are looked for that this process does not have.
const reloadInterval = time.Second

// AuditKey returns the key that authenticates the audit log: 32 bytes. It is derived from
// the first master key, and outlives that.
func (s *Store) AuditKey() []byte { return slices.Clone(s.masters.Load().audit) }

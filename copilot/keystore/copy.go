package keystore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// IsDatabase reports whether a store's name is a PostgreSQL URL, not a directory.
func IsDatabase(name string) bool {
	return strings.HasPrefix(name, "postgres://") || strings.HasPrefix(name, "postgresql://")
}

// Copy copies a store to another, which must not have any KEKs. Each is a directory
// or a PostgreSQL URL. Records go as they are, sealed: KEKs with all versions, their
// states, revocations and how often they have wrapped. The master key is the one
// of masterDir, or wrapped by master, as for [Open]. A directory that it is copied to gets
// a master.key unless it has one, or a KMS has wrapped the key. The last lines of audit
// logs are copied, too: renamed returns
// where a log will be, by where it was (see [AuditHead]).
//
// Nothing may use either store meanwhile. Copy reads back what it wrote and returns
// the number of KEKs.
func Copy(ctx context.Context, from, to, masterDir string, renamed func(log string) string, master ...Wrapping) (n int, err error) {
	if !IsDatabase(from) {
		if err := Exists(from); err != nil {
			return 0, err
		}
	}
	source, err := openDatabase(ctx, from)
	if err != nil {
		return 0, err
	}
	defer source.close()
	s := newStore(source, masterDir, "", master)
	raw, check, err := s.readMasters(ctx)
	if err == nil && raw == nil && check == nil {
		err = fmt.Errorf("%w in %s", ErrNoStore, from)
	}
	if err == nil {
		err = s.load(ctx, raw, check)
	}
	if errors.Is(err, errOtherMaster) {
		return 0, fmt.Errorf("the master key in %s is not the one that the KEKs in %s are sealed with", masterDir, from)
	}
	if err != nil {
		return 0, err
	}
	set := s.masters.Load()
	if set.state.rotating() {
		return 0, fmt.Errorf("%w: the master key of %s is being rotated: let \"copilot master rotate\" finish that first", ErrState, from)
	}
	target, err := openDatabase(ctx, to)
	if err != nil {
		return 0, err
	}
	defer target.close()
	if err := target.list(ctx, All, func(id string, _ []byte) error {
		return fmt.Errorf("%s has KEKs already, such as %s: copy to an empty store", to, id)
	}); err != nil {
		return 0, err
	}
	t := newStore(target, masterDir, "", nil)
	has, hasCheck, err := t.readMasters(ctx)
	if err != nil {
		return 0, err
	}
	if other := masterEntryOf(has, hasCheck); other != nil && !set.current.isOf(*other) {
		return 0, fmt.Errorf("%s was made with another master key: copy to a new store", to)
	}
	for name, b := range map[string][]byte{masterName: raw, masterCheck: check} {
		if b == nil {
			continue
		}
		if err := target.keep(ctx, name, func(_, _ []byte) ([]byte, error) { return b, nil }); err != nil {
			return 0, err
		}
	}
	if !IsDatabase(to) && len(master) == 0 {
		if err := putMaster(to, set.fileBytes()); err != nil {
			return 0, err
		}
	}
	err = target.fill(ctx, func(_ []byte, to contents) error {
		return source.snapshot(ctx, statePrefixes, contents{
			record: func(id string, record []byte) error {
				n++
				return to.record(id, record)
			},
			wraps: to.wraps, named: to.named,
		})
	})
	if err != nil {
		return n, err
	}
	t.masters.Store(set)
	heads, err := s.AuditHeads(ctx)
	for _, h := range heads {
		h.Log = renamed(h.Log)
		err = errors.Join(err, t.NoteAuditHead(ctx, h))
	}
	return n, err
}

// masterEntryOf returns the current master key's entry, or nil if the store is new.
func masterEntryOf(raw, check []byte) *masterEntry {
	state := legacyState(check)
	if raw != nil {
		var err error
		if state, err = parseMasterState(raw); err != nil {
			return &masterEntry{} // of no master key
		}
	} else if check == nil {
		return nil
	}
	return state.current()
}

// openDatabase opens the database of a store.
func openDatabase(ctx context.Context, name string) (database, error) {
	switch {
	case !IsDatabase(name):
		return openBolt(name)
	case openPostgres == nil:
		return nil, errNoPostgres
	}
	return openPostgres(ctx, name)
}

// putMaster writes the master key into a directory that has none.
func putMaster(dir string, key []byte) error {
	name := filepath.Join(dir, masterFile)
	if _, err := os.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return writeMaster(name, key)
}

package keystore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/ctrlplane/pilot/internal/aesgcm"
)

// IsDatabase reports whether a store's name is a PostgreSQL URL, not a directory.
func IsDatabase(name string) bool {
	return strings.HasPrefix(name, "postgres://") || strings.HasPrefix(name, "postgresql://")
}

// Copy copies a store to another, which must not have any KEKs. Each is a directory
// or a PostgreSQL URL. Records go as they are, sealed: KEKs with all versions, their
// states, revocations and how often they have wrapped. The master key is the one
// of masterDir, as for [Open]. A directory that it is copied to gets a master.key
// unless it has one. The last lines of audit logs are copied, too: renamed returns
// where a log will be, by where it was (see [AuditHead]).
//
// Nothing may use either store meanwhile. Copy reads back what it wrote and returns
// the number of KEKs.
func Copy(ctx context.Context, from, to, masterDir string, renamed func(log string) string) (n int, err error) {
	if !IsDatabase(from) {
		if err := Exists(from); err != nil {
			return 0, err
		}
	}
	key, err := masterKey(masterDir, false)
	if err != nil {
		return 0, err
	}
	defer clear(key)
	seal, err := aesgcm.New(key)
	if err != nil {
		return 0, err
	}
	source, err := openDatabase(ctx, from)
	if err != nil {
		return 0, err
	}
	defer source.close()
	nothing := errors.New("it has no master key's check")
	check, err := source.once(ctx, masterCheck, func() ([]byte, error) { return nil, nothing })
	if errors.Is(err, nothing) {
		return 0, fmt.Errorf("%w in %s", ErrNoStore, from)
	}
	if err != nil {
		return 0, err
	}
	if _, err := seal.Open(nil, nil, check, []byte(masterCheck)); err != nil {
		return 0, fmt.Errorf("the master key in %s is not the one that the KEKs in %s are sealed with", masterDir, from)
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
	has, err := target.once(ctx, masterCheck, func() ([]byte, error) { return check, nil })
	if err != nil {
		return 0, err
	}
	if _, err := seal.Open(nil, nil, has, []byte(masterCheck)); err != nil {
		return 0, fmt.Errorf("%s was made with another master key: copy to a new store", to)
	}
	if !IsDatabase(to) {
		if err := putMaster(to, key); err != nil {
			return 0, err
		}
	}
	err = source.list(ctx, All, func(id string, record []byte) error {
		n++
		if err := copyKEK(ctx, source, target, id, record); err != nil {
			return fmt.Errorf("copy %s: %w", id, err)
		}
		return nil
	})
	if err == nil {
		err = copyAuditHeads(ctx, source, target, seal, renamed)
	}
	return n, err
}

func copyKEK(ctx context.Context, source, target database, id string, record []byte) error {
	wraps, err := source.wraps(ctx, id)
	if err != nil {
		return err
	}
	for version, n := range wraps {
		if _, err := target.addWraps(ctx, id, version, n); err != nil {
			return err
		}
	}
	err = target.update(ctx, id, func(old []byte) ([]byte, error) {
		if old != nil {
			return nil, ErrExists
		}
		return record, nil
	})
	if err != nil {
		return err
	}
	written, err := target.get(ctx, id)
	if err == nil && !bytes.Equal(written, record) {
		err = errors.New("it was not written as it is")
	}
	return err
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

// Package keystore keeps key encryption keys (KEKs) and what is known of those
// that live elsewhere, in a file or in PostgreSQL, with their versions, their
// states, and how many keys they have wrapped.
package keystore

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Errors that a caller may decide by.
var (
	ErrNotFound = errors.New("no such KEK")
	// ErrNoVersion: the KEK exists, but not this version. It wraps ErrNotFound.
	ErrNoVersion = fmt.Errorf("%w version", ErrNotFound)
	ErrExists    = errors.New("a KEK of that name already exists")
	ErrInput     = errors.New("bad request")
	// ErrState: the KEK is not in a state in which this can be done.
	ErrState = errors.New("not in this state")
	// ErrDisabled: the KEK, or its version, is not to be used.
	ErrDisabled    = errors.New("the KEK is disabled")
	ErrUnavailable = errors.New("the key store can't be reached")
	// ErrDatabase: a PostgreSQL operation failed.
	ErrDatabase = errors.New("database")
)

// KeySize is the size in bytes of the KEKs that the store makes.
const KeySize = 32

// Store keeps KEKs. Each version of each KEK is sealed with AES-256-GCM under
// a master key that is not in the database, and so is what is known of it. A
// Store is safe for concurrent use.
type Store struct {
	db       database
	dir      string
	shared   bool      // with other copilots
	wrapping *Wrapping // of the master key; nil: it is in a file
	source   string    // the file that the master key is in, or BACKEND/PATH
	counts   counts
	now      func() time.Time
	made     bool

	anchors   anchors
	masters   atomic.Pointer[masterSet]
	reloading sync.Mutex
	missed    time.Time // when reloading did not help
}

// Made reports whether there was no store before: Open has made it, with a new
// master key unless there was one.
func (s *Store) Made() bool { return s.made }

// Shared reports whether other copilots may have the store open, too.
func (s *Store) Shared() bool { return s.shared }

// ErrNoStore is the error of a store that does not exist.
var ErrNoStore = errors.New("there is no store")

// Exists returns an error that wraps [ErrNoStore] unless the directory holds a
// store.
func Exists(dir string) error {
	name := filepath.Join(dir, boltFile)
	_, err := os.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w in %s: %s is missing: check the directory (--dir, --config), or restore it", ErrNoStore, dir, boltFile)
	}
	return err
}

// Both are nil in a program that was built without PostgreSQL. readPostgres opens a
// database that is there, to read.
var openPostgres, readPostgres func(ctx context.Context, url string) (database, error)

// Open opens the store in the PostgreSQL database at url, or, if url is
// empty, in a file in the directory dir, making what is missing. The master key is
// wrapped by master, if one is given. Otherwise it
// is in $CREDENTIALS_DIRECTORY/copilot-master-key if that exists, else in the
// file master.key in dir, which is made if the store is new.
func Open(ctx context.Context, dir, url string, master ...Wrapping) (*Store, error) {
	db, err := openDatabase(ctx, cmp.Or(url, dir))
	if err != nil {
		return nil, err
	}
	s := newStore(db, dir, url, master)
	if err := s.unlock(ctx); err != nil {
		db.close()
		return nil, err
	}
	return s, nil
}

func newStore(db database, dir, url string, master []Wrapping) *Store {
	s := &Store{db: db, dir: dir, shared: url != "", now: time.Now}
	if len(master) > 0 {
		s.wrapping = &master[0]
	}
	return s
}

// Close closes the store.
func (s *Store) Close() error { return s.db.close() }

// Ready reports whether the store can be used now.
func (s *Store) Ready(ctx context.Context) error { return s.db.ready(ctx) }

// validID is what a KEK can be named.
var validID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$`)

// CheckID refuses what can't be a KEK's name. Errors wrap [ErrInput].
func CheckID(id string) error {
	if !validID.MatchString(id) {
		return fmt.Errorf("%w: %.60q can't be a KEK's name: use up to 128 letters, digits, dots, dashes, underscores and slashes, a letter or digit first", ErrInput, id)
	}
	for element := range strings.SplitSeq(id, "/") {
		if strings.Trim(element, ".") == "" {
			return fmt.Errorf("%w: %.60q can't be a KEK's name: between slashes there has to be more than dots", ErrInput, id)
		}
	}
	return nil
}

// Get returns a KEK. A KEK whose key lives elsewhere has a record only once something
// was recorded about it.
func (s *Store) Get(ctx context.Context, id string) (KEK, error) {
	if CheckID(id) != nil {
		return KEK{}, ErrNotFound
	}
	b, err := s.db.get(ctx, id)
	if err != nil {
		return KEK{}, err
	}
	if b == nil {
		return KEK{}, ErrNotFound
	}
	k, err := s.decode(id, b)
	if s.catchesUp(ctx, err) {
		k, err = s.decode(id, b)
	}
	if err == nil {
		k, err = s.notRolledBack(ctx, k, b)
	}
	return k, err
}

// All is the filter of [Store.List] for all KEKs.
func All(string) bool { return true }

// List returns the KEKs whose ids are wanted, in the order of their ids. Those that
// are damaged are missing, and errors besides. The others are not read.
func (s *Store) List(ctx context.Context, wanted func(id string) bool) ([]KEK, error) {
	var list []KEK
	var damaged []error
	err := s.each(ctx, wanted, func(k KEK, err error) {
		if err != nil {
			damaged = append(damaged, err)
			return
		}
		list = append(list, k)
	})
	if err != nil {
		return nil, err
	}
	return list, errors.Join(damaged...)
}

// each calls do with the KEKs whose ids are wanted, in the order of their ids; of one that
// is damaged, with its id and the error.
func (s *Store) each(ctx context.Context, wanted func(id string) bool, do func(KEK, error)) error {
	catchUp, from := true, ""
	for {
		var missing error
		err := s.db.list(ctx, func(id string) bool { return id >= from && wanted(id) }, func(id string, b []byte) error {
			k, err := s.decode(id, b)
			if catchUp && errors.As(err, new(*missingMaster)) {
				// The master keys are read once the list is no longer being read.
				missing, from = err, id
				return err
			}
			do(k, err)
			return nil
		})
		if missing == nil {
			return err
		}
		catchUp = s.catchesUp(ctx, missing)
	}
}

// stored is how a KEK is written: as JSON, and what authenticates it.
type stored struct {
	Format int             `json:"format,omitempty"` // absent: 1
	Master int             `json:"master,omitempty"` // the master key that seals it; absent: 1
	KEK    json.RawMessage `json:"kek"`
	Tag    []byte          `json:"tag"` // 12-byte nonce, 16-byte tag
}

// recordFormat is the newest format of [stored] that this copilot knows.
const recordFormat = 1

// recordPlace is what the tag of a record is bound to.
func recordPlace(id string, kek []byte) []byte {
	return append(fmt.Appendf(nil, "record %d %s ", len(id), id), kek...)
}

// encode returns the record of a KEK whose versions are sealed under the key that it has.
func (s *Store) encode(k KEK) ([]byte, error) {
	b, err := json.Marshal(k.record)
	if err != nil {
		return nil, err
	}
	out := stored{KEK: b, Tag: k.by.sealFor(recordPlace(k.ID, b), nil)}
	if k.by.version > 1 {
		out.Master = k.by.version
	}
	return json.Marshal(out)
}

// renew seals the versions of a KEK under another master key.
func (k *KEK) renew(to *masterKey) error {
	if k.by == to {
		return nil
	}
	k.Versions = slices.Clone(k.Versions)
	for i, v := range k.Versions {
		if v.Sealed == nil {
			continue
		}
		key, err := k.open(v)
		if err != nil {
			return err
		}
		k.Versions[i].Sealed = to.sealFor(versionPlace(k.ID, v.Version), key)
		clear(key)
	}
	k.by = to
	return nil
}

// decode opens a record. The error is a [*missingMaster] if it is sealed under a master
// key that this process does not know yet.
func (s *Store) decode(id string, b []byte) (KEK, error) { return s.masters.Load().decode(id, b) }

func (m *masterSet) decode(id string, b []byte) (KEK, error) {
	k := KEK{ID: id}
	var in stored
	err := json.Unmarshal(b, &in)
	if err == nil && in.Format > recordFormat {
		return KEK{ID: id}, fmt.Errorf("%w: KEK %q has format %d, and this copilot knows %d", ErrNewer, id, in.Format, recordFormat)
	}
	if err == nil {
		version := max(in.Master, 1)
		if k.by = m.known[version]; k.by == nil {
			return KEK{ID: id}, fmt.Errorf("KEK %q is sealed under master key %d: %w", id, version, &missingMaster{version})
		}
		_, err = k.by.openFor(recordPlace(id, in.KEK), in.Tag)
	}
	if err == nil {
		err = json.Unmarshal(in.KEK, &k.record)
	}
	if err != nil {
		return KEK{ID: id}, fmt.Errorf("KEK %q %w", id, errDamaged)
	}
	return k, nil
}

var errDamaged = errors.New("is damaged or was tampered with in the store")

// open returns the key of a version. The caller clears it.
func (k *KEK) open(v Version) ([]byte, error) {
	key, err := k.by.openFor(versionPlace(k.ID, v.Version), v.Sealed)
	if err != nil {
		return nil, fmt.Errorf("KEK %q version %d %w", k.ID, v.Version, errDamaged)
	}
	return key, nil
}

// Change is a change of one KEK.
type Change struct {
	// Log, if not nil, is called with the KEK as it will be, right before the
	// change is made, which it is only if Log returns nil.
	Log func(KEK) error
	// Backend names where the KEK lives if it is not in this store; a record
	// of what is known of it is made if there is none.
	Backend string
}

// update changes a KEK; if that fails, nothing is changed.
func (s *Store) update(ctx context.Context, id string, c Change, change func(*KEK) error) (k KEK, err error) {
	if err := CheckID(id); err != nil {
		return KEK{}, err
	}
	r := row{true, id}
	var written []byte
	var changes int64
	err = s.current(ctx, func() error {
		return s.db.update(ctx, r, anchorName(r.shard()), func(old, master, side []byte) (b, newSide []byte, err error) {
			set, err := s.follow(master)
			if err != nil {
				return nil, nil, err
			}
			k = KEK{ID: id, record: record{Backend: c.Backend}, by: set.current}
			before := ""
			if old != nil {
				if k, err = set.decode(id, old); err != nil {
					return nil, nil, err
				}
				if before, err = k.digest(); err != nil {
					return nil, nil, err
				}
				if err := k.renew(set.current); err != nil {
					return nil, nil, err
				}
			}
			if err := s.compareWith(set, r, side, before); err != nil {
				return nil, nil, err
			}
			if err := change(&k); err != nil {
				return nil, nil, err
			}
			if c.Log != nil {
				if err := c.Log(k); err != nil {
					return nil, nil, err
				}
			}
			after, err := k.digest()
			if err != nil {
				return nil, nil, err
			}
			if newSide, changes, err = advance(set, r, side, after); err != nil {
				return nil, nil, err
			}
			b, err = s.encode(k)
			written = b
			return b, newSide, err
		})
	})
	if err == nil {
		// So that the record before is not taken for one that was compared.
		s.anchors.see(r.String(), sha256.Sum256(written))
		s.anchors.changed(r.shard(), changes)
	}
	return k, err
}

// counts has how many wraps of each version are set aside for this process.
type counts struct {
	mu    sync.Mutex
	ahead map[string]*ahead
}

// ahead is a number of wraps that are in the database's sum already.
type ahead struct {
	mu        sync.Mutex
	left, sum int64
}

func (c *counts) of(key string) *ahead {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ahead == nil {
		c.ahead = make(map[string]*ahead)
	}
	a, ok := c.ahead[key]
	if !ok {
		a = new(ahead)
		c.ahead[key] = a
	}
	return a
}

// Count adds n to the number of keys wrapped with a version and returns that
// number, which may be too high by a small part of the limit: many wraps are
// counted in the database together, before they are made.
func (s *Store) Count(ctx context.Context, id string, version int, n, limit int64) (int64, error) {
	a := s.counts.of(fmt.Sprintf("%s\x00%d", id, version))
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.left < n {
		more := max(n, limit>>16)
		sum, err := s.db.addWraps(ctx, id, version, more)
		if err != nil {
			return 0, err
		}
		a.left, a.sum = a.left+more, sum
	}
	a.left -= n
	return a.sum - a.left, nil
}

// Wraps returns how many keys each version of a KEK has wrapped, at most: what
// is set aside counts.
func (s *Store) Wraps(ctx context.Context, id string) (map[int]int64, error) {
	return s.db.wraps(ctx, id)
}

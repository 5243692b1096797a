package keystore

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// AuditHead is a line of an audit log that was the last one of its chain when it was
// noted. The store has one for each chain, sealed under the master key, so that a log
// whose end was cut off is found.
type AuditHead struct {
	Chain string    `json:"chain"`
	Seq   int64     `json:"seq"` // from 1
	MAC   string    `json:"mac"`
	Log   string    `json:"log"` // where the chain's lines are, in the caller's words
	At    time.Time `json:"at"`  // when it was noted
	// Lost says that the line was missing, and that a chain which began later says so.
	Lost bool `json:"lost,omitempty"`
	// Acknowledged says who has acknowledged that it is missing, and why; empty if nobody
	// has.
	Acknowledged string `json:"acknowledged,omitempty"`
}

// auditHead begins the names under which heads are kept, which end with the chain.
const auditHead = "audit head "

// ErrAuditHead is the error of a head that was not sealed by this store as it is.
var ErrAuditHead = errors.New("damaged or tampered with in the store")

// NoteAuditHead keeps a head instead of the one before of its chain.
func (s *Store) NoteAuditHead(ctx context.Context, h AuditHead) error {
	b, err := json.Marshal(h)
	if err != nil {
		return err
	}
	name := auditHead + h.Chain
	return s.current(ctx, func() error {
		return s.db.keep(ctx, name, func(_, master []byte) ([]byte, error) {
			set, err := s.follow(master)
			if err != nil {
				return nil, err
			}
			return set.current.sealFor([]byte(name), b), nil
		})
	})
}

// AuditHeads returns the heads of all chains.
func (s *Store) AuditHeads(ctx context.Context) ([]AuditHead, error) {
	var heads []AuditHead
	err := s.current(ctx, func() error {
		var names []string
		var values [][]byte
		err := s.db.named(ctx, auditHead, func(name string, sealed []byte) error {
			names, values = append(names, name), append(values, bytes.Clone(sealed))
			return nil
		})
		if err != nil {
			return err
		}
		heads = nil
		for i, name := range names {
			h, _, err := s.masters.Load().openHead(name, values[i])
			if err != nil {
				// It may be sealed under a master key that is new.
				if raw, _, readErr := s.readMasters(ctx); readErr == nil {
					if set, followErr := s.follow(raw); followErr == nil {
						h, _, err = set.openHead(name, values[i])
					} else {
						err = followErr
					}
				}
			}
			heads = append(heads, h)
			if err != nil {
				return err
			}
		}
		return nil
	})
	return heads, err
}

// openHead opens a head, and returns the master key that seals it.
func (m *masterSet) openHead(name string, sealed []byte) (h AuditHead, by *masterKey, err error) {
	for _, by := range m.keys() {
		b, err := by.openFor([]byte(name), sealed)
		if err == nil && json.Unmarshal(b, &h) == nil && auditHead+h.Chain == name {
			return h, by, nil
		}
	}
	return AuditHead{}, nil, fmt.Errorf("the last line of the audit log's chain %s was %w", strings.TrimPrefix(name, auditHead), ErrAuditHead)
}

// Read opens a store, as [Open] finds it, to read: one that no process on this machine
// has open. It makes nothing.
func Read(ctx context.Context, dir, url string, master ...Wrapping) (*Store, error) {
	var db database
	err := errNoPostgres
	switch {
	case url == "":
		if err = Exists(dir); err == nil {
			db, err = readBolt(filepath.Join(dir, boltFile))
		}
	case readPostgres != nil:
		db, err = readPostgres(ctx, url)
	}
	if err != nil {
		return nil, err
	}
	s := newStore(db, dir, url, master)
	raw, check, err := s.readMasters(ctx)
	if err == nil && raw == nil && check == nil {
		err = fmt.Errorf("%w in %s", ErrNoStore, cmp.Or(url, dir))
	}
	if err == nil {
		err = s.load(ctx, raw, check)
	}
	if err != nil {
		db.close()
		return nil, err
	}
	return s, nil
}

var errNoPostgres = errors.New("this copilot was built without PostgreSQL")

// AuditLogName returns the name of an audit log in a file, for [AuditHead]. Several
// copilots on a database have each a file of its own.
func AuditLogName(file string, shared bool) string {
	if abs, err := filepath.Abs(file); err == nil {
		file = abs
	}
	if host, err := os.Hostname(); err == nil && shared {
		return host + ":" + file
	}
	return file
}

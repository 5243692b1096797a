package keystore

import (
	"context"
	"crypto/cipher"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/internal/aesgcm"
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
	return putAuditHead(ctx, s.db, s.seal, h)
}

func putAuditHead(ctx context.Context, db database, seal cipher.AEAD, h AuditHead) error {
	b, err := json.Marshal(h)
	if err != nil {
		return err
	}
	name := auditHead + h.Chain
	return db.put(ctx, name, seal.Seal(nil, nil, b, []byte(name)))
}

// AuditHeads returns the heads of all chains.
func (s *Store) AuditHeads(ctx context.Context) ([]AuditHead, error) {
	return auditHeads(ctx, s.db, s.seal)
}

func auditHeads(ctx context.Context, db database, seal cipher.AEAD) ([]AuditHead, error) {
	var heads []AuditHead
	err := db.named(ctx, auditHead, func(name string, sealed []byte) error {
		h, err := openAuditHead(seal, name, sealed)
		if err != nil {
			return err
		}
		heads = append(heads, h)
		return nil
	})
	return heads, err
}

func openAuditHead(seal cipher.AEAD, name string, sealed []byte) (h AuditHead, err error) {
	b, err := seal.Open(nil, nil, sealed, []byte(name))
	if err == nil {
		err = json.Unmarshal(b, &h)
	}
	if err != nil || auditHead+h.Chain != name {
		return AuditHead{}, fmt.Errorf("the last line of the audit log's chain %s was %w", strings.TrimPrefix(name, auditHead), ErrAuditHead)
	}
	return h, nil
}

// ReadAuditHeads returns the heads of a store, as [Open] finds it, that no process on
// this machine has open. It makes nothing.
func ReadAuditHeads(ctx context.Context, dir, url string) ([]AuditHead, error) {
	key, err := masterKey(dir, false)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	seal, err := aesgcm.New(key)
	if err != nil {
		return nil, err
	}
	var db database
	switch {
	case url == "":
		if err = Exists(dir); err == nil {
			db, err = readBolt(filepath.Join(dir, boltFile))
		}
	case readPostgres == nil:
		err = errNoPostgres
	default:
		db, err = readPostgres(ctx, url)
	}
	if err != nil {
		return nil, err
	}
	defer db.close()
	return auditHeads(ctx, db, seal)
}

var errNoPostgres = errors.New("this copilot was built without PostgreSQL")

// copyAuditHeads copies the heads to another store. Logs have the names there that
// renamed returns.
func copyAuditHeads(ctx context.Context, from, to database, seal cipher.AEAD, renamed func(log string) string) error {
	heads, err := auditHeads(ctx, from, seal)
	for _, h := range heads {
		h.Log = renamed(h.Log)
		err = errors.Join(err, putAuditHead(ctx, to, seal, h))
	}
	return err
}

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

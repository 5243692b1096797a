package backup

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/ctrlplane/pilot/copilot/keystore"
)

// Described is a KEK of a store without its keys, to compare a backup with.
type Described struct {
	ID     string          `json:"kek"`
	Record json.RawMessage `json:"record"`
	// Checks are, by version, what only those can compute that have the key.
	Checks map[int][]byte `json:"checks"`
}

// Describe describes a KEK. The nonce is the reader's.
func Describe(k *keystore.HeldKEK, nonce []byte) Described {
	d := Described{ID: k.ID, Record: k.Record, Checks: make(map[int][]byte)}
	for version, key := range k.Keys {
		d.Checks[version] = check(key, nonce, k.ID, version)
	}
	return d
}

// check returns 16 bytes that say nothing of the key: HMAC-SHA-256.
func check(key, nonce []byte, id string, version int) []byte {
	h := hmac.New(sha256.New, key)
	fmt.Fprintf(h, "copilot backup check %x %d %s", nonce, version, id)
	return h.Sum(nil)[:16]
}

// Kinds of differences between a backup and a store.
const (
	Missing  = "missing"   // the KEK is not in the backup
	Older    = "older"     // the store's has changed since
	Gone     = "gone"      // the KEK is not in the store
	OtherKey = "other-key" // a version has another key
)

// Difference is a KEK that is not the same in a backup and in a store.
type Difference struct {
	KEK  string `json:"kek"`
	Kind string `json:"kind"`
	Text string `json:"text"`
}

// Compare compares the rest of a backup with the KEKs of a store, which next returns in
// the order of their ids until [io.EOF]. It reads the backup to its end.
func Compare(b *Reader, nonce []byte, next func() (Described, error)) ([]Difference, error) {
	list := []Difference{}
	note := func(id, kind, format string, a ...any) {
		list = append(list, Difference{id, kind, fmt.Sprintf(format, a...)})
	}
	at, err := next()
	for {
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		held, bad := b.nextKEK()
		if bad != nil && !errors.Is(bad, io.EOF) {
			return nil, bad
		}
		for err == nil && (held == nil || at.ID < held.ID) {
			note(at.ID, Missing, "is not in the backup: it was created later")
			at, err = next()
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		switch {
		case held == nil:
			return list, nil
		case err != nil || at.ID > held.ID:
			note(held.ID, Gone, "is in the backup, and not in the store: its record was deleted")
		default:
			kind, text, bad := differs(held, at, nonce)
			if bad != nil {
				return nil, bad
			}
			if kind != "" {
				note(held.ID, kind, "%s", text)
			}
			at, err = next()
		}
		held.Clear()
	}
}

// nextKEK returns the next KEK, or nil and [io.EOF] at the end.
func (b *Reader) nextKEK() (*keystore.HeldKEK, error) {
	for {
		h, err := b.Next()
		if err != nil || h.KEK != nil {
			return h.KEK, err
		}
	}
}

// differs says how a KEK of a store differs from the backup's.
func differs(held *keystore.HeldKEK, now Described, nonce []byte) (kind, text string, err error) {
	then, err := held.Decode()
	if err != nil {
		return "", "", err
	}
	in, err := keystore.DecodeRecord(now.ID, now.Record)
	if err != nil {
		return "", "", err
	}
	for _, v := range then.Versions {
		if _, ok := in.Version(v.Version); !ok {
			return Gone, fmt.Sprintf("version %d is in the backup, and not in the store: the store was rolled back", v.Version), nil
		}
		key, has := held.Keys[v.Version]
		if sum := now.Checks[v.Version]; has && sum != nil && !hmac.Equal(sum, check(key, nonce, now.ID, v.Version)) {
			return OtherKey, fmt.Sprintf("version %d has another key in the backup: find out who made it before you restore it", v.Version), nil
		}
	}
	if n := len(in.Versions) - len(then.Versions); n > 0 {
		return Older, fmt.Sprintf("the backup lacks the last %d of %d versions", n, len(in.Versions)), nil
	}
	if !bytes.Equal(held.Record, now.Record) {
		return Older, "the state of a version, or a revocation, has changed since the backup", nil
	}
	return "", "", nil
}

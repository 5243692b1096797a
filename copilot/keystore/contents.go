package keystore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"
)

// contents takes what a database has, a part at a time. The bytes are the taker's.
type contents struct {
	named func(name string, b []byte) error
	// wanted says which records are read, or is nil for all.
	wanted func(id string) bool
	record func(id string, b []byte) error
	// wraps is nil if they are not read.
	wraps func(id string, version int, n int64) error
}

// ErrNotEmpty is the error of filling a store that has KEKs.
var ErrNotEmpty = fmt.Errorf("%w: the store has KEKs already", ErrState)

// Held is a KEK, or its counts of wraps, or an audit log's last line, as a backup holds
// it. Of its members one is set.
type Held struct {
	KEK   *HeldKEK
	Wraps *HeldWraps
	Head  *AuditHead
}

// HeldKEK is all that the store has of a KEK.
type HeldKEK struct {
	ID string
	// Record is the JSON of its versions, their states, and revocations, without keys.
	Record json.RawMessage
	// Keys are those of the versions that have one, of 16, 24 or 32 bytes.
	Keys map[int][]byte
}

// Clear clears the keys.
func (k *HeldKEK) Clear() {
	for _, key := range k.Keys {
		clear(key)
	}
}

// HeldWraps is how many keys a version has wrapped, at most.
type HeldWraps struct {
	ID      string `json:"id"`
	Version int    `json:"version"`
	Wraps   int64  `json:"wraps"`
}

// Export calls do with everything that a backup holds, as of one moment: the heads of the
// audit log, then the KEKs in the order of their ids, then their counts. The keys are
// cleared after each call. A damaged record is an error.
func (s *Store) Export(ctx context.Context, do func(Held) error) error {
	// What is sealed under a master key that is new is known before the snapshot.
	if _, err := s.readSet(ctx); err != nil {
		return err
	}
	return s.db.snapshot(ctx, []string{auditHead}, contents{
		named: func(name string, sealed []byte) error {
			h, _, err := s.masters.Load().openHead(name, sealed)
			if err != nil {
				return err
			}
			return do(Held{Head: &h})
		},
		record: func(id string, b []byte) error {
			k, err := s.decode(id, b)
			if err != nil {
				return err
			}
			held := HeldKEK{ID: id, Keys: make(map[int][]byte)}
			defer held.Clear()
			for i, v := range k.Versions {
				if v.Sealed == nil {
					continue
				}
				if held.Keys[v.Version], err = k.open(v); err != nil {
					return err
				}
				k.Versions[i].Sealed = nil
			}
			if held.Record, err = json.Marshal(k.record); err != nil {
				return err
			}
			return do(Held{KEK: &held})
		},
		wraps: func(id string, version int, n int64) error {
			return do(Held{Wraps: &HeldWraps{id, version, n}})
		},
	})
}

// Import fills the store with what next returns until [io.EOF], sealed under this store's
// master key, in one transaction: there is all of it then, or nothing. It clears the keys.
// Heads are not imported: they are of the log of the store that was exported. The error
// wraps [ErrNotEmpty] if there is a KEK already.
//
// The store's generation is more than the one given then.
func (s *Store) Import(ctx context.Context, generation int64, next func() (Held, error)) (keks int, err error) {
	var list [anchorShards]anchor
	for i := range list {
		list[i] = anchor{1, make(map[string]string), true}
	}
	list[0].Changes = max(1, generation+1)
	fill := func(master []byte, to contents) error {
		// Nothing may be sealed under a master key that was dropped meanwhile.
		set, err := s.follow(master)
		if err == nil && set.state.rotating() {
			err = fmt.Errorf("%w: the store's master key is being rotated", ErrState)
		}
		if err != nil {
			return err
		}
		for {
			h, err := next()
			if errors.Is(err, io.EOF) {
				return s.fillAnchors(set, list[:], to)
			}
			if err != nil {
				return err
			}
			switch {
			case h.KEK != nil:
				b, digest, err := s.sealed(h.KEK, set.current)
				h.KEK.Clear()
				if err != nil {
					return err
				}
				r := row{true, h.KEK.ID}
				list[r.shard()].Digests[r.String()] = digest
				if err := to.record(h.KEK.ID, b); err != nil {
					return err
				}
				keks++
			case h.Wraps != nil:
				if err := to.wraps(h.Wraps.ID, h.Wraps.Version, h.Wraps.Wraps); err != nil {
					return err
				}
			}
		}
	}
	if err = s.current(ctx, func() error { return s.db.fill(ctx, fill) }); err == nil {
		for i, a := range list {
			s.anchors.changed(i, a.Changes)
		}
	}
	return keks, err
}

// sealed returns the record of a KEK from a backup, sealed under a master key.
func (s *Store) sealed(h *HeldKEK, by *masterKey) (b []byte, digest string, err error) {
	k, err := h.Decode()
	if err != nil {
		return nil, "", err
	}
	for i, v := range k.Versions {
		if key, ok := h.Keys[v.Version]; ok {
			k.Versions[i].Sealed = by.sealFor(versionPlace(k.ID, v.Version), key)
		}
	}
	k.by = by
	if b, err = s.encode(k); err == nil {
		digest, err = k.digest()
	}
	return b, digest, err
}

// DecodeRecord returns the KEK of a record without keys.
func DecodeRecord(id string, text json.RawMessage) (KEK, error) {
	k := KEK{ID: id}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&k.record); err != nil {
		return KEK{}, fmt.Errorf("KEK %q has what this copilot does not know: use the one that wrote it, or a newer one: %w", id, err)
	}
	return k, nil
}

// Decode returns the KEK, whose versions are without their keys, after checking that it
// can be one of a store.
func (h *HeldKEK) Decode() (KEK, error) {
	if err := CheckID(h.ID); err != nil {
		return KEK{}, err
	}
	k, err := DecodeRecord(h.ID, h.Record)
	if err != nil {
		return KEK{}, err
	}
	last := 0
	for _, v := range k.Versions {
		key, has := h.Keys[v.Version]
		needed := k.Backend == "" && v.State != Destroyed
		switch {
		case v.Version <= last, v.Sealed != nil:
			return KEK{}, fmt.Errorf("KEK %q has versions out of order", h.ID)
		case !slices.Contains([]State{"", Enabled, Disabled, Destroying, Destroyed}, v.State):
			return KEK{}, fmt.Errorf("KEK %q version %d has the unknown state %.20q", h.ID, v.Version, v.State)
		case has && !needed, needed && !slices.Contains([]int{16, 24, KeySize}, len(key)):
			return KEK{}, fmt.Errorf("KEK %q version %d has a key of %d bytes", h.ID, v.Version, len(key))
		}
		last = v.Version
	}
	if len(h.Keys) > len(k.Versions) {
		return KEK{}, fmt.Errorf("KEK %q has keys of versions that it does not have", h.ID)
	}
	return k, nil
}

// exportTimeout bounds reading, or filling, a whole store.
const exportTimeout = 10 * time.Minute

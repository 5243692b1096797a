package keystore

import (
	"context"
	"encoding/json"
	"errors"
	"path/filepath"
	"sync/atomic"
	"testing"
)

// oneAtATime fails a test that uses a database from what list or named call. bbolt then
// deadlocks if another goroutine grows the file in between, and PostgreSQL if that uses the
// pool's last connection.
type oneAtATime struct {
	database
	t       *testing.T
	reading atomic.Bool
}

func (d *oneAtATime) read(do func() error) error {
	if !d.reading.CompareAndSwap(false, true) {
		d.t.Error("the database is read while it is read")
		return errors.New("nested")
	}
	defer d.reading.Store(false)
	return do()
}

func (d *oneAtATime) list(ctx context.Context, wanted func(string) bool, do func(string, []byte) error) error {
	return d.read(func() error { return d.database.list(ctx, wanted, do) })
}

func (d *oneAtATime) named(ctx context.Context, prefix string, do func(string, []byte) error) error {
	return d.read(func() error { return d.database.named(ctx, prefix, do) })
}

func (d *oneAtATime) get(ctx context.Context, id string) (b []byte, err error) {
	err = d.read(func() error { b, err = d.database.get(ctx, id); return err })
	return b, err
}

// TestMasterKeysAreNotReadWithinAList has records and the last line of an audit log that no
// master key opens, so that the store looks for a new one.
func TestMasterKeysAreNotReadWithinAList(t *testing.T) {
	ctx := t.Context()
	s := openStore(t, filepath.Join(t.TempDir(), "store"))
	for _, id := range []string{"a", "b", "c", "d"} {
		if _, err := s.Create(ctx, id, nil, Change{}); err != nil {
			t.Fatal(err)
		}
	}
	for id, master := range map[string]int{"b": 7, "c": 8} {
		err := s.db.update(ctx, row{true, id}, anchorName(0), func(old, _, side []byte) (b, newSide []byte, err error) {
			var record stored
			if err = json.Unmarshal(old, &record); err == nil {
				record.Master = master
				b, err = json.Marshal(record)
			}
			return b, side, err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	err := s.db.keep(ctx, auditHead+"x", func(_, _ []byte) ([]byte, error) { return []byte("sealed by nobody"), nil })
	if err != nil {
		t.Fatal(err)
	}
	db := &oneAtATime{database: s.db, t: t}
	s.db = db

	var read, missing []string
	err = s.each(ctx, All, func(k KEK, err error) {
		read = append(read, k.ID)
		if errors.As(err, new(*missingMaster)) {
			missing = append(missing, k.ID)
		} else if err != nil {
			t.Error(err)
		}
	})
	if got := [2]int{len(read), len(missing)}; err != nil || got != [2]int{4, 2} || read[1] != "b" || missing[1] != "c" {
		t.Errorf("%v, without a master key %v: %v", read, missing, err)
	}
	if _, err := s.AuditHeads(ctx); !errors.Is(err, ErrAuditHead) {
		t.Error(err)
	}
}

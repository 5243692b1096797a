package keystore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"
	"time"
)

// TestMasterKeyRotatesWhileInUse reads and changes KEKs while the master key is rotated, and
// reads an audit log's head.
func TestMasterKeyRotatesWhileInUse(t *testing.T) {
	dir, ctx := t.TempDir(), t.Context()
	s := openStore(t, dir)
	const n = 300 // more than one batch
	first := make(map[string][]byte)
	for i := range n {
		id := fmt.Sprintf("kek-%d", i)
		if _, err := s.Create(ctx, id, nil, Change{}); err != nil {
			t.Fatal(err)
		}
		first[id], _, _ = key(s, id, 1)
	}
	audit := s.AuditKey()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for worker := range 2 {
		wg.Go(func() {
			for i := worker; ; i += 2 {
				select {
				case <-stop:
					return
				default:
				}
				id := fmt.Sprintf("kek-%d", i%n)
				if got, _, err := key(s, id, 1); err != nil || !bytes.Equal(got, first[id]) {
					t.Errorf("%s: %v", id, err)
				}
				if _, err := s.Rotate(ctx, id, 0, Change{}); err != nil {
					t.Errorf("rotate %s: %v", id, err)
				}
				if err := s.NoteAuditHead(ctx, AuditHead{Chain: id, Seq: int64(i + 1), MAC: "m", Log: "l"}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	none := func(int) error { return nil }
	for version := 2; version < 5; version++ {
		if got, err := s.RotateMaster(ctx, none); err != nil || got != version {
			t.Fatalf("%d, %v", got, err)
		}
		if _, err := s.RotateMaster(ctx, none); !errors.Is(err, ErrState) {
			t.Errorf("a second rotation: %v", err)
		}
		if done, err := s.ResealMaster(ctx, func(time.Duration) {}, none); err != nil || !done {
			t.Fatalf("%v, %v", done, err)
		}
		if heads, err := s.AuditHeads(ctx); err != nil || len(heads) == 0 {
			t.Errorf("%d heads, %v", len(heads), err)
		}
	}
	close(stop)
	wg.Wait()
	m, err := s.MasterStatus(ctx)
	if err != nil || m.Current != 4 || m.Rotating || len(m.Keys) != 1 || m.Keys[0].Records != n {
		t.Errorf("%+v, %v", m, err)
	}
	s.Close()
	s = openStore(t, dir)
	if !bytes.Equal(s.AuditKey(), audit) {
		t.Error("the audit log has another key")
	}
	for id, want := range first {
		if got, _, err := key(s, id, 1); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %v", id, err)
		}
	}
}

// lateRotation is a database in which another copilot rotates the master key right before it
// is filled.
type lateRotation struct {
	database
	rotate func()
}

func (d lateRotation) fill(ctx context.Context, do func([]byte, contents) error) error {
	d.rotate()
	return d.database.fill(ctx, do)
}

// TestImportSealsUnderTheMasterKeyOfNow restores a backup while another copilot rotates the
// master key: nothing is sealed under the one that was dropped.
func TestImportSealsUnderTheMasterKeyOfNow(t *testing.T) {
	dir, ctx := t.TempDir(), t.Context()
	s := openStore(t, dir)
	other := newStore(s.db, dir, "", nil)
	if err := other.unlock(ctx); err != nil {
		t.Fatal(err)
	}
	none := func(int) error { return nil }
	var once sync.Once
	s.db = lateRotation{s.db, func() {
		once.Do(func() {
			if _, err := other.RotateMaster(ctx, none); err != nil {
				t.Fatal(err)
			}
			if done, err := other.ResealMaster(ctx, func(time.Duration) {}, none); err != nil || !done {
				t.Fatalf("%v, %v", done, err)
			}
		})
	}}
	want := bytes.Repeat([]byte{7}, KeySize)
	held := []Held{{KEK: &HeldKEK{ID: "a", Record: []byte(`{"versions":[{"version":1}]}`), Keys: map[int][]byte{1: bytes.Clone(want)}}}}
	_, err := s.Import(ctx, 0, func() (h Held, err error) {
		if len(held) == 0 {
			return h, io.EOF
		}
		h, held = held[0], held[1:]
		return h, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	again := newStore(s.db, dir, "", nil)
	if err := again.unlock(ctx); err != nil {
		t.Fatal(err)
	}
	if got, _, err := key(again, "a", 1); err != nil || !bytes.Equal(got, want) {
		t.Errorf("after a restart: %v", err)
	}
}

// TestForgedMasterStateIsRefused has somebody who can write the database say during a
// rotation that nothing is sealed under the old master key any more, or that another copilot
// does not have it: neither a copilot that runs nor one that starts believes that.
func TestForgedMasterStateIsRefused(t *testing.T) {
	dir, ctx := t.TempDir(), t.Context()
	s := openStore(t, dir)
	s.shared = true
	if _, err := s.Create(ctx, "a", nil, Change{}); err != nil {
		t.Fatal(err)
	}
	if err := s.HoldMaster(ctx); err != nil {
		t.Fatal(err)
	}
	none := func(int) error { return nil }
	if _, err := s.RotateMaster(ctx, none); err != nil {
		t.Fatal(err)
	}
	raw, _, err := s.readMasters(ctx)
	if err != nil {
		t.Fatal(err)
	}
	put := func(b []byte) {
		if err := s.db.keep(ctx, masterName, func(_, _ []byte) ([]byte, error) { return b, nil }); err != nil {
			t.Fatal(err)
		}
	}
	for name, forge := range map[string]func(*masterState){
		"resealed":         func(m *masterState) { m.Resealed = true },
		"a holder less":    func(m *masterState) { m.Keys[0].Holders = nil },
		"a holder more":    func(m *masterState) { m.Keys[0].Holders = append(m.Keys[0].Holders, Holder{File: "b:/c"}) },
		"not authentic":    func(m *masterState) { m.Resealed, m.MAC = true, nil },
		"without rotation": func(m *masterState) { m.Keys = m.Keys[:1] },
	} {
		state, err := parseMasterState(raw)
		if err != nil {
			t.Fatal(err)
		}
		forge(&state)
		b, err := json.Marshal(state)
		if err != nil {
			t.Fatal(err)
		}
		put(b)
		if _, err := s.ResealMaster(ctx, func(time.Duration) {}, none); !errors.Is(err, errMasters) && name != "without rotation" || err == nil {
			t.Errorf("%s: a copilot that runs: %v", name, err)
		}
		if err := newStore(s.db, dir, "", nil).unlock(ctx); !errors.Is(err, errMasters) {
			t.Errorf("%s: a copilot that starts: %v", name, err)
		}
	}
	put(raw)
	if done, err := s.ResealMaster(ctx, func(time.Duration) {}, none); err != nil || !done {
		t.Errorf("%v, %v", done, err)
	}
}

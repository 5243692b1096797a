package keystore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
)

// unanchored returns stores that share a database, with KEKs and no anchors, as an earlier
// copilot has left it.
func unanchored(t *testing.T, n int) []*Store {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "store")
	made, err := Open(t.Context(), dir, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { made.Close() })
	for _, id := range []string{"a", "b", "c"} {
		if _, err := made.Create(t.Context(), id, nil, Change{}); err != nil {
			t.Fatal(err)
		}
	}
	err = made.db.(*boltDB).db.Update(func(tx *bolt.Tx) error {
		in := tx.Bucket(bucketOnce)
		return in.ForEach(func(name, _ []byte) error {
			if strings.HasPrefix(string(name), anchorPrefix) {
				return in.Delete(name)
			}
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	list := make([]*Store, n)
	for i := range list {
		list[i] = newStore(made.db, dir, "", nil)
		if err := list[i].unlock(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	return list
}

// TestStoresAnchorTogether has several copilots start at once on a database of an earlier
// one: all become ready.
func TestStoresAnchorTogether(t *testing.T) {
	list := unanchored(t, 8)
	var wg sync.WaitGroup
	start := make(chan struct{})
	for _, s := range list {
		wg.Go(func() {
			<-start
			if found, err := s.CheckAnchors(t.Context(), 0); err != nil || len(found) > 0 {
				t.Errorf("%v, %v", found, err)
			}
		})
	}
	close(start)
	wg.Wait()
	if a, b := list[0].Generation(), list[7].Generation(); a != b || a != anchorShards+1 {
		t.Errorf("%d and %d changes", a, b)
	}
}

// interrupted is a database that fails after some changes, as one does whose copilot is
// killed.
type interrupted struct {
	database
	left int
}

func (d *interrupted) keep(ctx context.Context, name string, change func(old, master []byte) ([]byte, error)) error {
	if d.left--; d.left < 0 {
		return ErrUnavailable
	}
	return d.database.keep(ctx, name, change)
}

func (d *interrupted) keepAll(ctx context.Context, names []string, change func(string, []byte) ([]byte, error)) error {
	return d.database.keepAll(ctx, names, func(name string, old []byte) ([]byte, error) {
		if d.left--; d.left < 0 {
			return nil, ErrUnavailable
		}
		return change(name, old)
	})
}

// TestAnchoringIsNotHalfDone interrupts the anchoring of a store. Then a record that is put
// back is found: none was left without an anchor.
func TestAnchoringIsNotHalfDone(t *testing.T) {
	s := unanchored(t, 1)[0]
	db := s.db
	s.db = &interrupted{db, 10}
	s.CheckAnchors(t.Context(), 0)
	s = newStore(db, s.dir, "", nil)
	if err := s.unlock(t.Context()); err != nil {
		t.Fatal(err)
	}
	if found, err := s.CheckAnchors(t.Context(), 0); err != nil || len(found) > 0 {
		t.Fatalf("%v, %v", found, err)
	}
	for _, id := range []string{"a", "b", "c"} {
		if a, err := s.readAnchor(t.Context(), row{true, id}.shard()); err != nil || a.Digests[rowKEK+id] == "" {
			t.Errorf("KEK %s has no anchor: %v", id, err)
		}
	}
}

// TestSweepGoesOnAfterWhatIsBad has two KEKs whose time has come, and the record of the first
// put back as it was earlier, or damaged, or its anchor, since the last check.
func TestSweepGoesOnAfterWhatIsBad(t *testing.T) {
	for name, spoil := range map[string]func(tx *bolt.Tx, earlier []byte) error{
		"a record put back": func(tx *bolt.Tx, earlier []byte) error { return tx.Bucket(bucketKEKs).Put([]byte("a"), earlier) },
		"a damaged record":  func(tx *bolt.Tx, _ []byte) error { return tx.Bucket(bucketKEKs).Put([]byte("a"), []byte("x")) },
		"a damaged anchor": func(tx *bolt.Tx, _ []byte) error {
			return tx.Bucket(bucketOnce).Put([]byte(anchorName(row{true, "a"}.shard())), []byte("x"))
		},
	} {
		s := unanchored(t, 1)[0]
		ctx := t.Context()
		if _, err := s.CheckAnchors(ctx, 0); err != nil {
			t.Fatal(err)
		}
		at := time.Now().Add(time.Hour)
		for _, id := range []string{"a", "b"} {
			if _, err := s.Destroy(ctx, id, 1, at, Change{}); err != nil {
				t.Fatal(err)
			}
		}
		earlier, err := s.db.get(ctx, "a")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Revoke(ctx, "a", "uid:7", Change{}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.CheckChanged(ctx, 0); err != nil {
			t.Fatal(err)
		}
		if err := s.db.(*boltDB).db.Update(func(tx *bolt.Tx) error { return spoil(tx, earlier) }); err != nil {
			t.Fatal(err)
		}
		s.now = func() time.Time { return at.Add(time.Second) }
		if err := s.Sweep(ctx, func(KEK, []int) error { return nil }); err == nil {
			t.Errorf("%s: no error", name)
		}
		b, err := s.Get(ctx, "b")
		if err != nil || b.Versions[0].Sealed != nil {
			t.Errorf("%s: the other KEK was not swept: %v, %v", name, b.Versions, err)
		}
	}
}

// rows returns all that a store's file has but KEKs, and puts it back.
func rows(t *testing.T, s *Store) (putBack func()) {
	t.Helper()
	kept := make(map[string][]byte)
	if err := s.db.(*boltDB).db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketOnce).ForEach(func(name, b []byte) error {
			kept[string(name)] = bytes.Clone(b)
			return nil
		})
	}); err != nil {
		t.Fatal(err)
	}
	return func() {
		err := s.db.(*boltDB).db.Update(func(tx *bolt.Tx) error {
			in := tx.Bucket(bucketOnce)
			for name, b := range kept {
				if err := in.Put([]byte(name), b); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestAcknowledgedRollbackVoidsApprovals puts back a database from before a request was
// used. Once that is acknowledged, in the copilot that runs, requests work again, there and
// after a restart, and the used one stays used.
func TestAcknowledgedRollbackVoidsApprovals(t *testing.T) {
	s := unanchored(t, 1)[0]
	ctx := t.Context()
	if _, err := s.CheckAnchors(ctx, 0); err != nil {
		t.Fatal(err)
	}
	use := func(s *Store, id string) error {
		_, err := s.ChangeApproval(ctx, id, func(a *Approval, _ bool) error {
			a.Used = time.Now()
			return nil
		})
		return err
	}
	if _, err := s.ChangeApproval(ctx, "one", func(a *Approval, _ bool) error { a.Approved = "uid:7"; return nil }); err != nil {
		t.Fatal(err)
	}
	putBack := rows(t, s)
	if err := use(s, "one"); err != nil {
		t.Fatal(err)
	}
	putBack()
	found, err := s.AcceptRollback(ctx, 0, func(map[string]string) error { return nil })
	if err != nil || found["store"] == "" {
		t.Fatalf("%v, %v", found, err)
	}
	again := newStore(s.db, s.dir, "", nil)
	if err := again.unlock(ctx); err != nil {
		t.Fatal(err)
	}
	if found, err := again.CheckAnchors(ctx, s.Generation()); err != nil || len(found) > 0 {
		t.Errorf("after a restart: %v, %v", found, err)
	}
	for i, s := range []*Store{s, again} {
		if err := use(s, "one"); !errors.Is(err, ErrRolledBack) {
			t.Errorf("used again: %v", err)
		}
		if err := use(s, fmt.Sprintf("new-%d", i)); err != nil {
			t.Error(err)
		}
		if list, err := s.Approvals(ctx); err != nil || len(list) != i+1 {
			t.Errorf("%v, %v", list, err)
		}
	}
}

// TestChangesOfOthersAreNoRollback reads a KEK for the first time, again and again, while
// others that share its anchor are changed.
func TestChangesOfOthersAreNoRollback(t *testing.T) {
	s := unanchored(t, 1)[0]
	ctx := t.Context()
	if _, err := s.CheckAnchors(ctx, 0); err != nil {
		t.Fatal(err)
	}
	shard := row{true, "a"}.shard()
	mate := ""
	for i := 0; mate == ""; i++ {
		if id := fmt.Sprintf("mate-%d", i); (row{true, id}).shard() == shard {
			mate = id
		}
	}
	if _, err := s.Create(ctx, mate, nil, Change{}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for range 30 {
				if _, err := s.Rotate(ctx, mate, 0, Change{}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	for {
		select {
		case <-done:
			return
		default:
		}
		s.anchors.mu.Lock()
		s.anchors.seen = nil
		s.anchors.mu.Unlock()
		if _, err := s.Get(ctx, "a"); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDeletedRecordOfAKEKInAKMSIsFound deletes the record that says that a KEK of a KMS is
// disabled: without one it would be enabled.
func TestDeletedRecordOfAKEKInAKMSIsFound(t *testing.T) {
	s := unanchored(t, 1)[0]
	ctx := t.Context()
	if _, err := s.CheckAnchors(ctx, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.Absent(ctx, "in-kms"); err != nil {
		t.Errorf("before there was a record: %v", err)
	}
	if _, err := s.Disable(ctx, "in-kms", 0, Change{Backend: "vault"}); err != nil {
		t.Fatal(err)
	}
	err := s.db.(*boltDB).db.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketKEKs).Delete([]byte("in-kms")) })
	if err != nil {
		t.Fatal(err)
	}
	again := newStore(s.db, s.dir, "", nil)
	if err := again.unlock(ctx); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*Store{s, again} {
		if err := s.Absent(ctx, "in-kms"); !errors.Is(err, ErrRolledBack) {
			t.Errorf("deleted: %v", err)
		}
		if err := s.Absent(ctx, "another"); err != nil {
			t.Errorf("another: %v", err)
		}
	}
}

// TestCheckReadsOnlyWhatHasChanged compares a store again and again: of records that are
// stored as before, nothing is read, and what is put back, deleted or damaged is found each
// time, until it is in order.
func TestCheckReadsOnlyWhatHasChanged(t *testing.T) {
	s := unanchored(t, 1)[0]
	ctx := t.Context()
	read := 0
	s.db = countedReads{s.db, &read}
	check := func(when string, reads int, want ...string) {
		t.Helper()
		read = 0
		found, err := s.CheckChanged(ctx, 0)
		if names := slices.Sorted(maps.Keys(found)); err != nil || !slices.Equal(names, want) || read != reads {
			t.Errorf("%s: found %v, read %d records: %v", when, names, read, err)
		}
	}
	bucket := func(do func(*bolt.Bucket) error) {
		t.Helper()
		if err := s.db.(countedReads).database.(*boltDB).db.Update(func(tx *bolt.Tx) error { return do(tx.Bucket(bucketKEKs)) }); err != nil {
			t.Fatal(err)
		}
	}
	listed := func(when string, least int64, ids string, want ...string) {
		t.Helper()
		list, bad, err := s.ListChecked(ctx, least)
		got := ""
		for _, k := range list {
			got += k.ID
		}
		if names := slices.Sorted(maps.Keys(bad)); err != nil || !slices.Equal(names, want) || got != ids {
			t.Errorf("%s: listed %s, and bad are %v: %v", when, got, names, err)
		}
	}
	check("first", 6) // anchored, and compared
	check("again", 0)
	earlier, err := s.db.get(ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Rotate(ctx, "a", 0, Change{}); err != nil {
		t.Fatal(err)
	}
	check("rotated", 1)
	later, err := s.db.get(ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	bucket(func(b *bolt.Bucket) error { return errors.Join(b.Put([]byte("a"), earlier), b.Delete([]byte("b"))) })
	listed("put back and deleted", 0, "ac", "kek a", "kek b")
	check("put back and deleted", 1, "kek a", "kek b")
	check("still", 1, "kek a", "kek b")
	if found, err := s.CheckAnchors(ctx, 0); err != nil || len(found) != 2 {
		t.Errorf("all of it: %v, %v", found, err)
	}
	bucket(func(b *bolt.Bucket) error { return b.Put([]byte("a"), later) })
	check("one in order", 1, "kek b")
	check("still", 0, "kek b")
	bucket(func(b *bolt.Bucket) error { return b.Put([]byte("c"), []byte("{}")) })
	listed("damaged", 1<<30, "a", "kek a", "kek b", "kek c", "store")
	check("damaged", 1, "kek b")
	check("still", 1, "kek b")
	if err := s.Sweep(ctx, func(KEK, []int) error { return nil }); !errors.Is(err, errDamaged) {
		t.Errorf("not reported: %v", err)
	}
	if _, err := s.AcceptRollback(ctx, 0, func(map[string]string) error { return nil }); err != nil {
		t.Fatal(err)
	}
	check("accepted", 2)
	check("still", 1)
}

// countedReads counts the records that are read.
type countedReads struct {
	database
	read *int
}

func (d countedReads) snapshot(ctx context.Context, prefixes []string, to contents) error {
	record := to.record
	to.record = func(id string, b []byte) error {
		*d.read++
		return record(id, b)
	}
	return d.database.snapshot(ctx, prefixes, to)
}

// putsBack is a database in which a record is put back between a check and what follows.
type putsBack struct {
	database
	after   int // snapshots
	putBack func()
}

func (d *putsBack) snapshot(ctx context.Context, prefixes []string, to contents) error {
	if d.after--; d.after < 0 {
		d.putBack()
	}
	return d.database.snapshot(ctx, prefixes, to)
}

// TestAcknowledgementNamesWhatItAccepts puts back a second record while somebody acknowledges
// the first.
func TestAcknowledgementNamesWhatItAccepts(t *testing.T) {
	s := unanchored(t, 1)[0]
	ctx := t.Context()
	if _, err := s.CheckAnchors(ctx, 0); err != nil {
		t.Fatal(err)
	}
	db := s.db.(*boltDB)
	earlier := make(map[string][]byte)
	for _, id := range []string{"a", "b"} {
		b, err := db.get(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		earlier[id] = b
		if _, err := s.Revoke(ctx, id, "uid:7", Change{}); err != nil {
			t.Fatal(err)
		}
	}
	putBack := func(id string) {
		if err := db.db.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketKEKs).Put([]byte(id), earlier[id]) }); err != nil {
			t.Fatal(err)
		}
	}
	putBack("a")
	s.db = &putsBack{db, 1, func() { putBack("b") }}
	var logged []string
	accepted, err := s.AcceptRollback(ctx, 0, func(found map[string]string) error {
		logged = slices.Sorted(maps.Keys(found))
		return nil
	})
	if want := []string{"kek a", "kek b"}; err != nil || !slices.Equal(logged, want) || !slices.Equal(slices.Sorted(maps.Keys(accepted)), want) {
		t.Errorf("logged %v, accepted %v, %v", logged, accepted, err)
	}
}

// TestExpiredApprovalsAreDropped drops requests that have expired, used ones and ones that an
// acknowledged rollback has voided. None of them can be put back, whatever the clock says.
func TestExpiredApprovalsAreDropped(t *testing.T) {
	s := unanchored(t, 1)[0]
	ctx, now := t.Context(), time.Now()
	if _, err := s.CheckAnchors(ctx, 0); err != nil {
		t.Fatal(err)
	}
	create := func(id string, expires time.Duration) {
		t.Helper()
		if _, err := s.ChangeApproval(ctx, id, func(a *Approval, _ bool) error {
			a.Approved, a.Expires = "uid:7", now.Add(expires)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	listed := func() (ids []string) {
		list, err := s.Approvals(ctx)
		if err != nil {
			t.Error(err)
		}
		for _, a := range list {
			ids = append(ids, a.ID)
		}
		slices.Sort(ids)
		return ids
	}
	create("voided", -time.Hour)
	if err := s.db.(*boltDB).db.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketKEKs).Delete([]byte("a")) }); err != nil {
		t.Fatal(err)
	}
	if _, err := s.AcceptRollback(ctx, 0, func(map[string]string) error { return nil }); err != nil {
		t.Fatal(err)
	}
	for i := range dropAtOnce {
		create(fmt.Sprint("old-", i), -time.Hour)
	}
	create("open", time.Hour)
	putBack := rows(t, s)
	for range 2 {
		if err := s.DropApprovals(ctx, now); err != nil {
			t.Fatal(err)
		}
	}
	if ids := listed(); !slices.Equal(ids, []string{"open"}) {
		t.Errorf("left: %v", ids)
	}
	a, err := s.readAnchor(ctx, anchorShards)
	if err != nil || len(a.Digests) != 1 {
		t.Errorf("the anchor has %d digests, %v", len(a.Digests), err)
	}
	raw, err := s.masters.Load().sealAnchor(anchorName(anchorShards), a)
	if err != nil {
		t.Fatal(err)
	}
	putBack()
	if err := s.db.keep(ctx, anchorName(anchorShards), func(_, _ []byte) ([]byte, error) { return raw, nil }); err != nil {
		t.Fatal(err)
	}
	if list, err := s.Approvals(ctx); len(list) != 1 || !errors.Is(err, ErrRolledBack) {
		t.Errorf("put back: %d requests, %v", len(list), err)
	}
	if _, err := s.ChangeApproval(ctx, "old-1", func(*Approval, bool) error { return nil }); !errors.Is(err, ErrRolledBack) {
		t.Errorf("used: %v", err)
	}
}

// TestAcknowledgedDeletionStaysOne acknowledges that one record was deleted, and does so while
// another one is damaged. Neither can be put back as it was before a revocation.
func TestAcknowledgedDeletionStaysOne(t *testing.T) {
	s := unanchored(t, 1)[0]
	ctx := t.Context()
	if _, err := s.CheckAnchors(ctx, 0); err != nil {
		t.Fatal(err)
	}
	db := s.db.(*boltDB)
	bucket := func(do func(*bolt.Bucket) error) {
		t.Helper()
		if err := db.db.Update(func(tx *bolt.Tx) error { return do(tx.Bucket(bucketKEKs)) }); err != nil {
			t.Fatal(err)
		}
	}
	earlier := make(map[string][]byte)
	for _, id := range []string{"a", "b"} {
		var err error
		if earlier[id], err = db.get(ctx, id); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Revoke(ctx, id, "uid:7", Change{}); err != nil {
			t.Fatal(err)
		}
	}
	bucket(func(b *bolt.Bucket) error {
		return errors.Join(b.Delete([]byte("a")), b.Put([]byte("b"), []byte("{}")))
	})
	if _, err := s.AcceptRollback(ctx, 0, func(map[string]string) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if err := s.Absent(ctx, "a"); err != nil {
		t.Errorf("acknowledged: %v", err)
	}
	bucket(func(b *bolt.Bucket) error {
		return errors.Join(b.Put([]byte("a"), earlier["a"]), b.Put([]byte("b"), earlier["b"]))
	})
	again := newStore(s.db, s.dir, "", nil)
	if err := again.unlock(ctx); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*Store{s, again} {
		found, err := s.CheckChanged(ctx, 0)
		if names := slices.Sorted(maps.Keys(found)); err != nil || !slices.Equal(names, []string{"kek a", "kek b"}) {
			t.Errorf("found %v, %v", names, err)
		}
		for id := range earlier {
			if _, err := s.Get(ctx, id); !errors.Is(err, ErrRolledBack) {
				t.Errorf("KEK %s is used as it was before its revocation: %v", id, err)
			}
		}
	}
}

// TestStoreOfAnEarlierCopilotIsCompleted opens a store that an earlier copilot has left: what it
// says of its master keys has no MAC, and only KEKs that were changed lately have an anchor.
// Then nobody can take the MAC away.
func TestStoreOfAnEarlierCopilotIsCompleted(t *testing.T) {
	s := unanchored(t, 1)[0]
	ctx := t.Context()
	s.shared = true
	if err := s.HoldMaster(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Rotate(ctx, "a", 0, Change{}); err != nil {
		t.Fatal(err)
	}
	raw, _, err := s.readMasters(ctx)
	if err != nil {
		t.Fatal(err)
	}
	state, err := parseMasterState(raw)
	if err != nil {
		t.Fatal(err)
	}
	state.Format, state.MAC = 1, nil
	unsigned, err := json.Marshal(state)
	if err != nil {
		t.Fatal(err)
	}
	put := func() {
		t.Helper()
		if err := s.db.keep(ctx, masterName, func(_, _ []byte) ([]byte, error) { return unsigned, nil }); err != nil {
			t.Fatal(err)
		}
	}
	open := func() (*Store, error) {
		s := newStore(s.db, s.dir, "", nil)
		s.shared = true
		return s, s.unlock(ctx)
	}
	put()
	now, err := open()
	if err != nil {
		t.Fatal(err)
	}
	if raw, _, err = s.readMasters(ctx); err != nil || bytes.Equal(raw, unsigned) {
		t.Errorf("the state has no MAC: %v", err)
	}
	if found, err := now.CheckAnchors(ctx, s.Generation()); err != nil || len(found) > 0 {
		t.Fatalf("%v, %v", found, err)
	}
	for _, id := range []string{"a", "b", "c"} {
		if a, err := now.readAnchor(ctx, row{true, id}.shard()); err != nil || !a.Complete || a.Digests[rowKEK+id] == "" {
			t.Errorf("KEK %s has no anchor: %v", id, err)
		}
		if _, err := now.Get(ctx, id); err != nil {
			t.Error(err)
		}
	}
	if generation := now.Generation(); generation != anchorShards+2 {
		t.Errorf("%d changes", generation)
	}
	put()
	if _, err := now.Rotate(ctx, "a", 0, Change{}); !errors.Is(err, errMasters) {
		t.Errorf("without its MAC, in a copilot that runs: %v", err)
	}
	if _, err := open(); !errors.Is(err, errMasters) {
		t.Errorf("without its MAC, at the start: %v", err)
	}
}

// TestEarlierStoreThatWasPutBackIsNotCompleted has a store of an earlier copilot in which a
// record was put back: what is found stays found.
func TestEarlierStoreThatWasPutBackIsNotCompleted(t *testing.T) {
	s := unanchored(t, 1)[0]
	ctx := t.Context()
	earlier, err := s.db.get(ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Revoke(ctx, "a", "uid:7", Change{}); err != nil {
		t.Fatal(err)
	}
	if err := s.db.(*boltDB).db.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketKEKs).Put([]byte("a"), earlier) }); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if found, err := s.CheckAnchors(ctx, 0); err != nil || found["kek a"] == "" {
			t.Errorf("%v, %v", found, err)
		}
	}
	if found, err := s.CheckAnchors(ctx, 100); err != nil || found["store"] == "" {
		t.Errorf("%v, %v", found, err)
	}
}

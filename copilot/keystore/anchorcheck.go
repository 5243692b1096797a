package keystore

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"maps"
	"slices"
	"strings"
	"time"
)

// checked is what the last check has found of the records of one anchor.
type checked struct {
	// sum is of the anchor and its records as they are stored, if they were in order, and
	// else zero.
	sum     [sha256.Size]byte
	changes int64
	// due is when the next key of a KEK is to be destroyed.
	due map[string]time.Time
	// damaged are the errors of records that can't be read, by id.
	damaged map[string]error
}

// unread returns the errors of records that can't be read.
func (c *checked) unread() error { return errors.Join(slices.Collect(maps.Values(c.damaged))...) }

// shardSums compute the sums of all anchors, with their records in the order of ids.
type shardSums [anchorShards + 1]hash.Hash

func (s *shardSums) add(shard int, name string, stored [sha256.Size]byte) {
	if s[shard] == nil {
		s[shard] = sha256.New()
	}
	fmt.Fprintf(s[shard], "%d %s ", len(name), name)
	s[shard].Write(stored[:])
}

func (s *shardSums) sum(shard int) (sum [sha256.Size]byte) {
	if s[shard] != nil {
		s[shard].Sum(sum[:0])
	}
	return sum
}

// CheckAnchors compares all records with their anchors, and the store with a generation
// that it had at least. It returns what was put back, or deleted: a record's name or the
// store's, and why. After it, no record of a store that is too old is used.
func (s *Store) CheckAnchors(ctx context.Context, least int64) (map[string]string, error) {
	s.anchors.checking.Lock()
	s.anchors.checked = [anchorShards + 1]checked{}
	s.anchors.checking.Unlock()
	return s.CheckChanged(ctx, least)
}

// CheckChanged is [Store.CheckAnchors] for what is not stored as it was at the last check: of
// the rest, it reads digests, which the database computes.
func (s *Store) CheckChanged(ctx context.Context, least int64) (map[string]string, error) {
	s.anchors.checking.Lock()
	defer s.anchors.checking.Unlock()
	known := s.Generation()
	if err := s.completeAnchors(ctx, max(least, known)); err != nil {
		return nil, err
	}
	var sums shardSums
	err := s.db.sums(ctx, anchorPrefix, func(name string, stored [sha256.Size]byte) error {
		if shard, ok := shardOf(name); ok {
			sums.add(shard, "", stored)
		}
		return nil
	}, func(id string, stored [sha256.Size]byte) error {
		sums.add(row{true, id}.shard(), id, stored)
		return nil
	})
	if err != nil {
		return nil, err
	}
	var changed []int
	for i, c := range s.anchors.checked {
		if sum := sums.sum(i); sum != c.sum || sum == [sha256.Size]byte{} {
			changed = append(changed, i)
		}
	}
	found, err := s.checkShards(ctx, changed)
	if err != nil {
		return nil, err
	}
	var changes [anchorShards + 1]int64
	for i, c := range s.anchors.checked {
		changes[i] = c.changes
	}
	s.anchors.forget(found)
	if whole := s.anchors.compareAll(changes, max(least, known)); whole != "" {
		found["store"] = whole
	}
	return found, nil
}

// CheckGeneration is the part of [Store.CheckAnchors] that reads no records: each of them is
// compared when it is used.
func (s *Store) CheckGeneration(ctx context.Context, least int64) error {
	s.anchors.checking.Lock()
	defer s.anchors.checking.Unlock()
	least = max(least, s.Generation())
	if err := s.completeAnchors(ctx, least); err != nil {
		return err
	}
	set, err := s.readSet(ctx)
	if err != nil {
		return err
	}
	var changes [anchorShards + 1]int64
	err = s.db.named(ctx, anchorPrefix, func(name string, b []byte) error {
		if shard, ok := shardOf(name); ok {
			a, _ := set.openAnchor(name, b) // a damaged one counts as none
			changes[shard] = a.Changes
		}
		return nil
	})
	if err == nil {
		s.anchors.compareAll(changes, least)
	}
	return err
}

// compareAll compares how often all anchors were changed with the least that it can be. It
// returns why no record can be relied on, or "".
func (a *anchors) compareAll(changes [anchorShards + 1]int64, least int64) (whole string) {
	whole = tooOld(changes, least)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.whole = whole
	for i, n := range changes {
		a.changes[i] = max(a.changes[i], n)
	}
	return whole
}

// tooOld says that all anchors were changed less often than least, or returns "".
func tooOld(changes [anchorShards + 1]int64, least int64) string {
	var sum int64
	for _, n := range changes {
		sum += n
	}
	if sum >= least {
		return ""
	}
	return fmt.Sprintf("it was changed %d times, and copilot knows of %d", sum, least)
}

// ListChecked returns all KEKs at one moment, in the order of their ids, and the names of
// records that can't be relied on, with why: those that [Store.CheckAnchors] finds, and those
// that are damaged, which are missing. Without an anchor, or all of the store, no KEK can be.
func (s *Store) ListChecked(ctx context.Context, least int64) (list []KEK, bad map[string]string, err error) {
	least = max(least, s.Generation())
	now, err := s.look(ctx, nil, nil, func(_ int, k KEK, _ string) {
		if k.by != nil { // not damaged
			list = append(list, k)
		}
	})
	if err != nil {
		return nil, nil, err
	}
	var changes [anchorShards + 1]int64
	for i, c := range now.checked {
		changes[i] = c.changes
		for id, err := range c.damaged {
			now.found[row{true, id}.String()] = err.Error()
		}
	}
	whole := tooOld(changes, least)
	if whole != "" {
		now.found["store"] = whole
	}
	for _, k := range list {
		r := row{true, k.ID}
		if why := cmp.Or(whole, now.found[anchorName(r.shard())]); why != "" {
			now.found[r.String()] = why
		}
	}
	return list, now.found, nil
}

// KEKOf returns the KEK that the name of a record is of, and whether it is one's.
func KEKOf(name string) (id string, ok bool) { return strings.CutPrefix(name, rowKEK) }

// completeAnchors anchors all records of a store that an earlier copilot made. It leaves one
// that has fewer changes than least, or a record that was put back, as it is.
func (s *Store) completeAnchors(ctx context.Context, least int64) error {
	if s.anchors.complete.Load() {
		return nil
	}
	if a, err := s.readAnchor(ctx, anchorShards); err != nil || a.Complete {
		s.anchors.complete.Store(err == nil)
		return nil // a damaged one is reported by the check
	}
	err := s.anchorAll(ctx, 0, 1, func(now *look) error {
		var sum int64
		for _, c := range now.checked {
			sum += c.changes
			if err := c.unread(); errors.As(err, new(*missingMaster)) {
				return fmt.Errorf("%w: %w", ErrState, err)
			}
		}
		if sum < least || len(now.found) > 0 || now.anchors[anchorShards].Complete {
			return ErrState
		}
		return nil
	})
	if errors.Is(err, ErrState) { // also if another copilot has done it meanwhile
		return nil
	}
	return err
}

// checkShards compares the records of some anchors, and notes what it has found.
func (s *Store) checkShards(ctx context.Context, shards []int) (found map[string]string, err error) {
	var wanted func(int) bool
	switch len(shards) {
	case 0:
		return make(map[string]string), nil
	case len(s.anchors.checked): // all
	default:
		wanted = func(shard int) bool { return slices.Contains(shards, shard) }
	}
	now, err := s.look(ctx, nil, wanted, func(int, KEK, string) {})
	if err != nil {
		return nil, err
	}
	for _, i := range shards {
		c := now.checked[i]
		if !now.bad[i] && len(c.damaged) == 0 {
			c.sum = now.sums.sum(i)
		}
		s.anchors.checked[i] = c
	}
	return now.found, nil
}

// look is what a store has at one moment.
type look struct {
	anchors [anchorShards + 1]anchor // less what was compared
	sums    shardSums
	checked [anchorShards + 1]checked // without sums
	bad     [anchorShards + 1]bool    // something of it was found
	found   map[string]string
}

// look compares records with their anchors at one moment: of those anchors that are wanted, or
// of all if wanted is nil. It calls do with each KEK and its record's digest; if the record is
// damaged, with the id alone and the anchor's digest. It calls named, if it is not nil, with what
// is kept under the other names that belong to the records.
func (s *Store) look(ctx context.Context, named func(name string), wanted func(shard int) bool, do func(shard int, k KEK, digest string)) (*look, error) {
	set, err := s.readSet(ctx)
	if err != nil {
		return nil, err
	}
	l := &look{found: make(map[string]string)}
	find := func(shard int, name, reason string) {
		l.found[name], l.bad[shard] = reason, true
	}
	to := contents{
		named: func(name string, b []byte) error {
			shard, ok := shardOf(name)
			if !ok && named != nil {
				named(name)
			}
			if !ok || wanted != nil && !wanted(shard) {
				return nil
			}
			l.sums.add(shard, "", sha256.Sum256(b))
			a, err := set.openAnchor(name, b)
			if err != nil {
				find(shard, name, err.Error())
			}
			l.anchors[shard], l.checked[shard].changes = a, a.Changes
			return nil
		},
		record: func(id string, b []byte) error {
			r := row{true, id}
			shard := r.shard()
			l.sums.add(shard, id, sha256.Sum256(b))
			c, digests := &l.checked[shard], l.anchors[shard].Digests
			want, ok := digests[r.String()]
			delete(digests, r.String())
			k, err := set.decode(id, b)
			if err != nil { // damaged, which is reported where it is used, or of a newer master key
				if c.damaged == nil {
					c.damaged = make(map[string]error)
				}
				c.damaged[id] = err
				if ok {
					do(shard, KEK{ID: id}, want)
				}
				return nil
			}
			digest, err := k.digest()
			if err != nil {
				return err
			}
			do(shard, k, digest)
			if want != digest && (ok || l.anchors[shard].Complete) {
				find(shard, r.String(), "it is not as copilot has written it last")
			}
			for _, v := range k.Versions {
				if at, ok := c.due[id]; v.State == Destroying && (!ok || v.DestroyAt.Before(at)) {
					if c.due == nil {
						c.due = make(map[string]time.Time)
					}
					c.due[id] = v.DestroyAt
				}
			}
			return nil
		},
	}
	if wanted != nil {
		to.wanted = func(id string) bool { return wanted(row{true, id}.shard()) }
	}
	if err := s.db.snapshot(ctx, statePrefixes, to); err != nil {
		return nil, err
	}
	for shard, a := range l.anchors {
		for name := range a.Digests {
			if strings.HasPrefix(name, rowKEK) {
				find(shard, name, "its record was deleted")
			}
		}
	}
	return l, nil
}

// due returns the KEKs of which a key is to be destroyed by now, and the errors of records that
// can't be read, as of the last check.
func (s *Store) due() (ids []string, damaged error) {
	s.anchors.checking.Lock()
	defer s.anchors.checking.Unlock()
	var errs []error
	for _, c := range s.anchors.checked {
		for id, at := range c.due {
			if !s.now().Before(at) {
				ids = append(ids, id)
			}
		}
		errs = append(errs, c.unread())
	}
	slices.Sort(ids)
	return ids, errors.Join(errs...)
}

// acceptJump is by how much each anchor's number of changes grows when records are accepted
// as they are: other copilots may have seen more changes than this one knows of.
const acceptJump = 1 << 20

// AcceptRollback takes all records as they are now: their anchors are made anew, and the
// generation is more than the one given. It returns what was accepted, as
// [Store.CheckAnchors] does; log is called with that right before.
func (s *Store) AcceptRollback(ctx context.Context, least int64, log func(found map[string]string) error) (map[string]string, error) {
	found, err := s.CheckAnchors(ctx, least)
	if err != nil || len(found) == 0 {
		return found, err
	}
	return found, s.anchorAll(ctx, least+1, acceptJump, func(now *look) error {
		// What was put back since the check is named, too.
		maps.Copy(found, now.found)
		return log(found)
	})
}

// voided is the digest of a request for approval from before its record may have been put
// back: it is never used again, and nothing reports it.
const voided = "voided"

// anchorAll makes all anchors anew, each with so many changes more, and a generation that is
// least or more. Requests for approval are voided: a used one may have been put back. before is
// called with what the store has: nothing is done if it fails.
func (s *Store) anchorAll(ctx context.Context, least, jump int64, before func(now *look) error) error {
	digests := make([]map[string]string, anchorShards+1)
	for i := range digests {
		digests[i] = make(map[string]string)
	}
	set, err := s.readSet(ctx)
	if err != nil {
		return err
	}
	now, err := s.look(ctx, func(name string) { digests[anchorShards][name] = voided }, nil, func(shard int, k KEK, digest string) {
		digests[shard][row{true, k.ID}.String()] = digest
	})
	if err == nil {
		err = before(now)
	}
	if err != nil {
		return err
	}
	s.anchors.mu.Lock()
	changes := s.anchors.changes
	s.anchors.mu.Unlock()
	var sum int64
	for i := range changes {
		changes[i] = max(changes[i], now.anchors[i].Changes) + jump
		sum += changes[i]
	}
	changes[0] += max(0, least-sum)
	var names []string
	for i := range changes {
		names = append(names, anchorName(i))
	}
	err = s.db.keepAll(ctx, names, func(name string, old []byte) ([]byte, error) {
		i, _ := shardOf(name)
		a, _ := set.openAnchor(name, old) // a damaged one is replaced
		if a.Changes != now.anchors[i].Changes {
			return nil, fmt.Errorf("%w: a record was changed meanwhile: try again", ErrState)
		}
		return set.sealAnchor(name, anchor{changes[i], digests[i], true})
	})
	if err != nil {
		return err
	}
	s.anchors.mu.Lock()
	defer s.anchors.mu.Unlock()
	s.anchors.changes, s.anchors.whole, s.anchors.seen = changes, "", nil
	s.anchors.complete.Store(true)
	return nil
}

// fillAnchors stores the anchors of a restored store, in place of those that it had when it
// was empty.
func (s *Store) fillAnchors(set *masterSet, list []anchor, to contents) error {
	s.anchors.mu.Lock()
	defer s.anchors.mu.Unlock()
	for i := range list {
		name := anchorName(i)
		list[i].Changes = max(list[i].Changes, s.anchors.changes[i]+1)
		b, err := set.sealAnchor(name, list[i])
		if err != nil {
			return err
		}
		if err := to.named(name, b); err != nil {
			return err
		}
	}
	return nil
}

// statePrefixes begin the names of what belongs to the records.
var statePrefixes = []string{anchorPrefix, approvalPrefix}

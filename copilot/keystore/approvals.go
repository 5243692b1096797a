package keystore

import (
	"bytes"
	"context"
	"crypto/hmac"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Approval is a request of one admin to do something that needs a second one.
type Approval struct {
	ID        string `json:"id"`
	Operation string `json:"operation"`
	KEK       string `json:"kek,omitempty"`
	// Content says what will be done, all of it: nothing else can be done with it.
	Content string `json:"content"`
	By      string `json:"by"` // who has asked
	// Owner says whether that was somebody who can get at the store itself: they are one,
	// whatever user they run as. Earlier versions did not say.
	Owner   *bool     `json:"owner,omitempty"`
	At      time.Time `json:"at"`
	Expires time.Time `json:"expires"`
	// Approved is who has approved it, or empty.
	Approved   string    `json:"approved,omitempty"`
	ApprovedAt time.Time `json:"approvedAt,omitzero"`
	// Used is when it was done: once.
	Used time.Time `json:"used,omitzero"`
}

// Open reports whether it can still be approved, or used.
func (a Approval) Open(now time.Time) bool { return a.Used.IsZero() && now.Before(a.Expires) }

// approvalPrefix begins the names under which they are kept, authenticated as anchors are,
// and with an anchor: one that was used, or dropped, can't be put back.
const approvalPrefix = "approval "

type storedApproval struct {
	Approval json.RawMessage `json:"approval"`
	MAC      []byte          `json:"mac"`
}

func (m *masterSet) openApproval(name string, b []byte) (a Approval, err error) {
	var in storedApproval
	err = json.Unmarshal(b, &in)
	if err == nil && !hmac.Equal(in.MAC, m.stateMAC(name, in.Approval)) {
		err = errDamaged
	}
	if err == nil {
		err = json.Unmarshal(in.Approval, &a)
	}
	if err != nil || approvalPrefix+a.ID != name {
		return Approval{}, fmt.Errorf("%s %w", name, errDamaged)
	}
	return a, nil
}

// approvalRows returns what is kept of requests, by row, and their anchor.
func (s *Store) approvalRows(ctx context.Context) (rows map[string][]byte, a anchor, least int64, err error) {
	rows = make(map[string][]byte)
	err = s.db.named(ctx, approvalPrefix, func(name string, b []byte) error {
		rows[name] = b
		return nil
	})
	if err == nil {
		least = s.seenChanges(anchorShards)
		a, err = s.readAnchor(ctx, anchorShards)
	}
	return rows, a, least, err
}

// Approvals returns all requests. One that was put back in the database as it was earlier
// is missing, and an error besides.
func (s *Store) Approvals(ctx context.Context) (list []Approval, err error) {
	set, err := s.readSet(ctx)
	if err != nil {
		return nil, err
	}
	rows, a, least, err := s.approvalRows(ctx)
	if err != nil {
		return nil, err
	}
	var bad error
	for name, b := range rows {
		if a.Digests[name] == voided {
			continue
		}
		approval, err := set.openApproval(name, b)
		if err == nil {
			err = s.compare(row{name: name}, a, least, digestOf(b))
		}
		if err != nil {
			bad = errors.Join(bad, err)
			continue
		}
		list = append(list, approval)
	}
	return list, bad
}

// dropAtOnce bounds how many requests are dropped together, each in a transaction.
const dropAtOnce = 100

// DropApprovals drops requests that had expired at a time, used or not.
func (s *Store) DropApprovals(ctx context.Context, expired time.Time) error {
	set, err := s.readSet(ctx)
	if err != nil {
		return err
	}
	rows, _, _, err := s.approvalRows(ctx)
	if err != nil {
		return err
	}
	left := dropAtOnce
	for name, b := range rows {
		a, err := set.openApproval(name, b)
		if err != nil || !a.Expires.Before(expired) {
			continue
		}
		if left--; left < 0 {
			break
		}
		if err := s.dropApproval(ctx, row{name: name}, b); err != nil {
			return err
		}
	}
	return nil
}

// dropApproval drops a request that is kept as b, unless it was put back.
func (s *Store) dropApproval(ctx context.Context, r row, b []byte) error {
	var changes int64
	err := s.current(ctx, func() error {
		return s.db.update(ctx, r, anchorName(r.shard()), func(old, master, side []byte) (_, newSide []byte, err error) {
			set, err := s.follow(master)
			if err != nil {
				return nil, nil, err
			}
			a, err := set.openAnchor(anchorName(r.shard()), side)
			if err == nil && a.Digests[r.String()] != voided {
				err = s.compare(r, a, s.seenChanges(r.shard()), digestOf(b))
			}
			if err == nil && !bytes.Equal(old, b) {
				err = errNothing // another copilot did it
			}
			if err != nil {
				return nil, nil, err
			}
			a.Changes++
			delete(a.Digests, r.String())
			changes = a.Changes
			newSide, err = set.sealAnchor(anchorName(r.shard()), a)
			return nil, newSide, err
		})
	})
	switch {
	case errors.Is(err, ErrRolledBack), errors.Is(err, errNothing):
		return nil // what was put back stays to be reported
	case err == nil:
		s.anchors.changed(r.shard(), changes)
	}
	return err
}

// ChangeApproval makes a request, which change gets with its id only, or changes it. If
// change fails, nothing is changed.
func (s *Store) ChangeApproval(ctx context.Context, id string, change func(a *Approval, isNew bool) error) (a Approval, err error) {
	if id == "" || strings.ContainsAny(id, " /") || len(id) > 64 {
		return a, fmt.Errorf("%w: %.60q is not the id of a request", ErrInput, id)
	}
	r := row{name: approvalPrefix + id}
	var changes int64
	err = s.current(ctx, func() error {
		return s.db.update(ctx, r, anchorName(r.shard()), func(old, master, side []byte) (b, newSide []byte, err error) {
			set, err := s.follow(master)
			if err != nil {
				return nil, nil, err
			}
			before := ""
			a = Approval{ID: id}
			if old != nil {
				before = digestOf(old)
				if a, err = set.openApproval(r.name, old); err != nil {
					return nil, nil, err
				}
			}
			if err := s.compareWith(set, r, side, before); err != nil {
				return nil, nil, err
			}
			if err := change(&a, old == nil); err != nil {
				return nil, nil, err
			}
			text, err := json.Marshal(a)
			if err != nil {
				return nil, nil, err
			}
			if b, err = json.Marshal(storedApproval{text, set.stateMAC(r.name, text)}); err != nil {
				return nil, nil, err
			}
			newSide, changes, err = advance(set, r, side, digestOf(b))
			return b, newSide, err
		})
	})
	if err == nil {
		s.anchors.changed(r.shard(), changes)
	}
	return a, err
}

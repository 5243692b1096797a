package keystore

import (
	"bytes"
	"context"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
)

// Anchors find records that were put back as they were earlier. A record alone is
// authentic at any age, so the store also keeps, in anchorShards parts, the digest of each
// record as copilot has written it last, and how often a part has changed. The sum of
// those is the store's generation, which lines of the audit log have: a store that is put
// back with its anchors has a lower one than its log.

// anchorShards is how many anchors there are: those of 100,000 KEKs have about 400 each.
const anchorShards = 256

// anchorPrefix begins the names under which anchors are kept.
const anchorPrefix = "anchor "

// anchor is one of them.
type anchor struct {
	// Changes is how often a record of this anchor was changed.
	Changes int64 `json:"changes"`
	// Digests are those of the records, by row.
	Digests map[string]string `json:"digests"`
	// Complete says that each record of this anchor has a digest: one without was put back
	// after its deletion was acknowledged. Of the last anchor, it also says that what the
	// store keeps of its master keys has a MAC.
	Complete bool `json:"complete,omitempty"`
}

// storedAnchor is how an anchor is kept: JSON, and HMAC-SHA-256 by a key that is derived from
// the audit log's, since both outlive master keys.
type storedAnchor struct {
	Anchor json.RawMessage `json:"anchor"`
	MAC    []byte          `json:"mac"`
}

// ErrRolledBack is the error of a record that is older than the one that copilot has
// written last, and of a store that is older than its audit log.
var ErrRolledBack = fmt.Errorf("%w: its record was put back as it was earlier, in the database: see \"copilot store check\" on the broker's machine", ErrDisabled)

// anchors is what this process knows of the anchors.
type anchors struct {
	mu sync.Mutex
	// changes are the most that each anchor was seen to have.
	changes [anchorShards + 1]int64
	// seen are the stored bytes' digests of the records that were compared, by row.
	seen map[string][sha256.Size]byte
	// whole says why no record can be relied on, or is "".
	whole string
	// complete says that all anchors are.
	complete atomic.Bool

	checking sync.Mutex
	checked  [anchorShards + 1]checked
}

// see notes the digest of a record's stored bytes that agree with its anchor.
func (a *anchors) see(name string, sum [sha256.Size]byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.seen == nil {
		a.seen = make(map[string][sha256.Size]byte)
	}
	a.seen[name] = sum
}

// forget forgets that records were compared.
func (a *anchors) forget(found map[string]string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for name := range found {
		delete(a.seen, name)
	}
}

// row names a record, among KEKs or what is kept under a name.
type row struct {
	kek  bool
	name string
}

// rowKEK begins the text of a KEK's row.
const rowKEK = "kek "

func (r row) String() string {
	if r.kek {
		return rowKEK + r.name
	}
	return r.name
}

// shard returns the number of the row's anchor. Rows that are no KEKs have one of their own,
// the last.
func (r row) shard() int {
	if !r.kek {
		return anchorShards
	}
	h := fnv.New32a()
	h.Write([]byte(r.String()))
	return int(h.Sum32() % anchorShards)
}

func anchorName(shard int) string {
	if shard == anchorShards {
		return anchorPrefix + "others"
	}
	return fmt.Sprintf("%s%02x", anchorPrefix, shard)
}

// shardOf returns the number of the anchor of a name.
func shardOf(name string) (shard int, ok bool) {
	text, ok := strings.CutPrefix(name, anchorPrefix)
	if text == "others" {
		return anchorShards, ok
	}
	n, err := strconv.ParseUint(text, 16, 8)
	return int(n), ok && err == nil && anchorName(int(n)) == name
}

// stateKey authenticates what is kept and no secret.
func (m *masterSet) stateKey() []byte {
	key, err := hkdf.Key(sha256.New, m.audit, nil, "copilot store state", sha256.Size)
	if err != nil {
		panic(err) // of sizes
	}
	return key
}

func (m *masterSet) stateMAC(name string, b []byte) []byte {
	h := hmac.New(sha256.New, m.stateKey())
	fmt.Fprintf(h, "%d %s ", len(name), name)
	h.Write(b)
	return h.Sum(nil)
}

// openAnchor opens an anchor. Nil is a new one.
func (m *masterSet) openAnchor(name string, b []byte) (anchor, error) {
	a := anchor{Digests: make(map[string]string)}
	if b == nil {
		return a, nil
	}
	var in storedAnchor
	err := json.Unmarshal(b, &in)
	if err == nil && !hmac.Equal(in.MAC, m.stateMAC(name, in.Anchor)) {
		err = errDamaged
	}
	if err == nil {
		err = json.Unmarshal(in.Anchor, &a)
	}
	if err != nil {
		return anchor{}, fmt.Errorf("the store's %s %w", name, errDamaged)
	}
	return a, nil
}

func (m *masterSet) sealAnchor(name string, a anchor) ([]byte, error) {
	b, err := json.Marshal(a)
	if err != nil {
		return nil, err
	}
	return json.Marshal(storedAnchor{b, m.stateMAC(name, b)})
}

// digest returns the digest of a KEK's record without its sealed keys: sealing it under
// another master key does not change it.
func (k KEK) digest() (string, error) {
	bare := k.record
	bare.Versions = slices.Clone(bare.Versions)
	for i := range bare.Versions {
		bare.Versions[i].Sealed = nil
	}
	b, err := json.Marshal(bare)
	return digestOf(b), err
}

func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return base64.RawURLEncoding.EncodeToString(sum[:16])
}

// advance returns the anchor, side, after a change of a row to a digest, and how often it
// has changed then.
func advance(set *masterSet, r row, side []byte, digest string) ([]byte, int64, error) {
	name := anchorName(r.shard())
	a, err := set.openAnchor(name, side)
	if err != nil {
		return nil, 0, err
	}
	a.Changes++
	a.Digests[r.String()] = digest
	side, err = set.sealAnchor(name, a)
	return side, a.Changes, err
}

// changed notes that an anchor has changed so often, so that the generation counts it.
func (a *anchors) changed(shard int, changes int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	seen := &a.changes[shard]
	*seen = max(*seen, changes)
}

// compareWith compares the digest of a row, which is empty if there is no record, with its
// anchor, side.
func (s *Store) compareWith(set *masterSet, r row, side []byte, digest string) error {
	a, err := set.openAnchor(anchorName(r.shard()), side)
	if err != nil {
		return err
	}
	return s.compare(r, a, s.seenChanges(r.shard()), digest)
}

// seenChanges returns the most changes that an anchor was seen to have.
func (s *Store) seenChanges(shard int) int64 {
	s.anchors.mu.Lock()
	defer s.anchors.mu.Unlock()
	return s.anchors.changes[shard]
}

// compare compares the digest of a row with its anchor, which has to have at least so many
// changes: those that were seen before it was read. In an anchor that is not complete, the
// record of a KEK may have no digest.
func (s *Store) compare(r row, a anchor, least int64, digest string) error {
	s.anchors.mu.Lock()
	defer s.anchors.mu.Unlock()
	if why := s.anchors.whole; why != "" {
		return fmt.Errorf("%s: %w (all of the store: %s)", r, ErrRolledBack, why)
	}
	if a.Changes < least {
		return fmt.Errorf("%s: %w (and its anchor)", r, ErrRolledBack)
	}
	seen := &s.anchors.changes[r.shard()]
	*seen = max(*seen, a.Changes)
	if want, ok := a.Digests[r.String()]; ok && want != digest || !ok && digest != "" && (a.Complete || !r.kek) {
		return fmt.Errorf("%s: %w", r, ErrRolledBack)
	}
	return nil
}

// notRolledBack compares a KEK, which was read as b, with its anchor, unless it was
// compared before. It returns the KEK as it is by then.
func (s *Store) notRolledBack(ctx context.Context, k KEK, b []byte) (KEK, error) {
	name := row{true, k.ID}.String()
	for range 3 {
		sum := sha256.Sum256(b)
		s.anchors.mu.Lock()
		known := s.anchors.seen[name] == sum && s.anchors.whole == ""
		s.anchors.mu.Unlock()
		if known {
			return k, nil
		}
		err := s.compareNow(ctx, k)
		if err == nil {
			s.anchors.see(name, sum)
			return k, nil
		}
		if !errors.Is(err, ErrRolledBack) {
			return KEK{}, err
		}
		// It may have been changed between reading it and its anchor.
		again, getErr := s.db.get(ctx, k.ID)
		if getErr != nil || again == nil || bytes.Equal(again, b) {
			return KEK{}, errors.Join(err, getErr)
		}
		b = again
		if k, err = s.decode(k.ID, b); err != nil {
			return KEK{}, err
		}
	}
	return KEK{}, fmt.Errorf("%w: KEK %q changes all the time", ErrUnavailable, k.ID)
}

// Absent returns an error that wraps [ErrRolledBack] if a KEK had a record, which [Store.Get]
// did not find.
func (s *Store) Absent(ctx context.Context, id string) error {
	name, none := row{true, id}.String(), sha256.Sum256(nil)
	s.anchors.mu.Lock()
	known := s.anchors.seen[name] == none && s.anchors.whole == ""
	s.anchors.mu.Unlock()
	if known {
		return nil
	}
	err := s.compareRow(ctx, row{true, id}, "")
	if err == nil {
		s.anchors.see(name, none)
		return nil
	}
	if again, getErr := s.db.get(ctx, id); getErr == nil && again != nil {
		return fmt.Errorf("%w: KEK %q got its record just now", ErrUnavailable, id)
	}
	return err
}

func (s *Store) compareNow(ctx context.Context, k KEK) error {
	digest, err := k.digest()
	if err != nil {
		return err
	}
	return s.compareRow(ctx, row{true, k.ID}, digest)
}

// compareRow compares the digest of a row with its anchor as it is now.
func (s *Store) compareRow(ctx context.Context, r row, digest string) error {
	least := s.seenChanges(r.shard())
	a, err := s.readAnchor(ctx, r.shard())
	if err == nil {
		err = s.compare(r, a, least, digest)
	}
	return err
}

func (s *Store) readAnchor(ctx context.Context, shard int) (a anchor, err error) {
	name := anchorName(shard)
	found, err := s.readNamed(ctx, name)
	if err != nil {
		return a, err
	}
	return s.masters.Load().openAnchor(name, found)
}

// Generation returns how often the store was changed, as far as this process knows.
func (s *Store) Generation() (sum int64) {
	s.anchors.mu.Lock()
	defer s.anchors.mu.Unlock()
	for _, n := range s.anchors.changes {
		sum += n
	}
	return sum
}

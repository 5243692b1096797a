package keystore

import (
	"context"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"sync"
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
}

// anchored is how an anchor is kept: JSON, and HMAC-SHA-256 by a key that is derived from
// the audit log's, since both outlive master keys.
type anchored struct {
	Anchor json.RawMessage `json:"anchor"`
	MAC    []byte          `json:"mac"`
}

// ErrRolledBack is the error of a record that is older than the one that copilot has
// written last, and of a store that is older than its audit log.
var ErrRolledBack = errors.New("was put back as it was earlier, in the database: \"copilot store check\" says more")

// anchors is what this process knows of the anchors.
type anchors struct {
	mu sync.Mutex
	// changes are the most that each anchor was seen to have.
	changes [anchorShards]int64
	// seen are the stored bytes' digests of the records that were compared, by row.
	seen map[string][sha256.Size]byte
	// whole says why no record can be relied on, or is "".
	whole string
}

// row names a record, among KEKs or what is kept under a name.
type row struct {
	kek  bool
	name string
}

func (r row) String() string {
	if r.kek {
		return "kek " + r.name
	}
	return r.name
}

// shard returns the number of the row's anchor.
func (r row) shard() int {
	h := fnv.New32a()
	h.Write([]byte(r.String()))
	return int(h.Sum32() % anchorShards)
}

func anchorName(shard int) string { return fmt.Sprintf("%s%02x", anchorPrefix, shard) }

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
	var in anchored
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
	return json.Marshal(anchored{b, m.stateMAC(name, b)})
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

// advance returns the anchor after a change of a row from a digest to another; an empty
// one is that of no record.
func (s *Store) advance(set *masterSet, r row, side []byte, from, to string) ([]byte, error) {
	name := anchorName(r.shard())
	a, err := set.openAnchor(name, side)
	if err != nil {
		return nil, err
	}
	if err := s.compare(r, a, from); err != nil {
		return nil, err
	}
	a.Changes++
	a.Digests[r.String()] = to
	return set.sealAnchor(name, a)
}

// compare compares the digest of a row with its anchor. A record that was written before
// there were anchors has none.
func (s *Store) compare(r row, a anchor, digest string) error {
	s.anchors.mu.Lock()
	defer s.anchors.mu.Unlock()
	if why := s.anchors.whole; why != "" {
		return fmt.Errorf("the store %w (%s)", ErrRolledBack, why)
	}
	seen := &s.anchors.changes[r.shard()]
	if a.Changes < *seen {
		return fmt.Errorf("the anchor of %s %w", r, ErrRolledBack)
	}
	*seen = a.Changes
	if want, ok := a.Digests[r.String()]; ok && want != digest {
		return fmt.Errorf("%s %w", r, ErrRolledBack)
	}
	return nil
}

// current compares a KEK, which was read as b, with its anchor, unless it was compared
// before.
func (s *Store) notRolledBack(ctx context.Context, k KEK, b []byte) error {
	r, sum := row{true, k.ID}, sha256.Sum256(b)
	s.anchors.mu.Lock()
	known := s.anchors.seen[r.String()] == sum && s.anchors.whole == ""
	s.anchors.mu.Unlock()
	if known {
		return nil
	}
	err := s.compareNow(ctx, k)
	for range 2 { // the record was changed between reading it and its anchor
		if !errors.Is(err, ErrRolledBack) {
			break
		}
		b, getErr := s.db.get(ctx, k.ID)
		if getErr != nil || b == nil {
			return errors.Join(err, getErr)
		}
		now, decodeErr := s.decode(k.ID, b)
		if decodeErr != nil {
			return errors.Join(err, decodeErr)
		}
		sum = sha256.Sum256(b)
		err = s.compareNow(ctx, now)
	}
	if err != nil {
		return err
	}
	s.anchors.mu.Lock()
	defer s.anchors.mu.Unlock()
	if s.anchors.seen == nil {
		s.anchors.seen = make(map[string][sha256.Size]byte)
	}
	s.anchors.seen[r.String()] = sum
	return nil
}

func (s *Store) compareNow(ctx context.Context, k KEK) error {
	digest, err := k.digest()
	if err != nil {
		return err
	}
	r := row{true, k.ID}
	a, err := s.readAnchor(ctx, r.shard())
	if err != nil {
		return err
	}
	return s.compare(r, a, digest)
}

func (s *Store) readAnchor(ctx context.Context, shard int) (a anchor, err error) {
	name := anchorName(shard)
	var found []byte
	err = s.db.named(ctx, name, func(_ string, b []byte) error {
		found = slices.Clone(b)
		return nil
	})
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

// CheckAnchors compares all records with their anchors, and the store with a generation
// that it had at least. It returns what was put back, or deleted: a record's name or the
// store's, and why. After it, no record of a store that is too old is used.
func (s *Store) CheckAnchors(ctx context.Context, least int64) (map[string]string, error) {
	found := make(map[string]string)
	set, err := s.readSet(ctx)
	if err != nil {
		return nil, err
	}
	var anchorsNow [anchorShards]anchor
	for i := range anchorsNow {
		anchorsNow[i].Digests = map[string]string{}
	}
	var bad error
	known := s.Generation()
	err = s.db.snapshot(ctx, anchorPrefix, contents{
		named: func(name string, b []byte) error {
			var shard int
			if _, err := fmt.Sscanf(name, anchorPrefix+"%02x", &shard); err != nil || shard < 0 || shard >= anchorShards {
				return nil
			}
			a, err := set.openAnchor(name, b)
			if err != nil {
				bad = errors.Join(bad, err)
				found[name] = err.Error()
				return nil
			}
			anchorsNow[shard] = a
			return nil
		},
		record: func(id string, b []byte) error {
			k, err := set.decode(id, b)
			if err != nil {
				return nil // damaged: reported where it is used
			}
			digest, err := k.digest()
			if err != nil {
				return err
			}
			r := row{true, id}
			digests := anchorsNow[r.shard()].Digests
			if want, ok := digests[r.String()]; ok && want != digest {
				found[r.String()] = "it is not as copilot has written it last"
			}
			delete(digests, r.String())
			return nil
		},
		wraps: func(string, int, int64) error { return nil },
	})
	if err != nil {
		return nil, err
	}
	var sum int64
	for _, a := range anchorsNow {
		sum += a.Changes
		for name := range a.Digests {
			if len(name) > 4 && name[:4] == "kek " {
				found[name] = "its record was deleted"
			}
		}
	}
	whole := ""
	if least = max(least, known); sum < least {
		whole = fmt.Sprintf("it was changed %d times, and copilot knows of %d", sum, least)
		found["store"] = whole
	}
	s.anchors.mu.Lock()
	defer s.anchors.mu.Unlock()
	s.anchors.whole = whole
	for i, a := range anchorsNow {
		s.anchors.changes[i] = max(s.anchors.changes[i], a.Changes)
	}
	return found, nil
}

// AcceptRollback takes all records as they are now: their anchors are made anew, and the
// generation is at least the one given. It returns what was accepted, as
// [Store.CheckAnchors] does; log is called with that right before.
func (s *Store) AcceptRollback(ctx context.Context, least int64, log func(found map[string]string) error) (map[string]string, error) {
	found, err := s.CheckAnchors(ctx, least)
	if err != nil || len(found) == 0 {
		return found, err
	}
	if err := log(found); err != nil {
		return nil, err
	}
	list := make(map[int]map[string]string)
	err = s.db.list(ctx, All, func(id string, b []byte) error {
		k, err := s.decode(id, b)
		if err != nil {
			return nil
		}
		r := row{true, id}
		if list[r.shard()] == nil {
			list[r.shard()] = make(map[string]string)
		}
		list[r.shard()][r.String()], err = k.digest()
		return err
	})
	if err != nil {
		return nil, err
	}
	s.anchors.mu.Lock()
	changes := s.anchors.changes
	s.anchors.mu.Unlock()
	var sum int64
	for i := range changes {
		changes[i]++
		sum += changes[i]
	}
	changes[0] += max(0, least+1-sum)
	for i := range anchorShards {
		err := s.db.keep(ctx, anchorName(i), func(old, master []byte) ([]byte, error) {
			set, err := s.follow(master)
			if err != nil {
				return nil, err
			}
			a := anchor{Changes: changes[i], Digests: maps.Clone(list[i])}
			if before, err := set.openAnchor(anchorName(i), old); err == nil {
				for name, digest := range before.Digests {
					if len(name) < 4 || name[:4] != "kek " {
						if a.Digests == nil {
							a.Digests = make(map[string]string)
						}
						a.Digests[name] = digest
					}
				}
			}
			return set.sealAnchor(anchorName(i), a)
		})
		if err != nil {
			return nil, err
		}
	}
	s.anchors.mu.Lock()
	s.anchors.changes, s.anchors.whole, s.anchors.seen = changes, "", nil
	s.anchors.mu.Unlock()
	return found, nil
}

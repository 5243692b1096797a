// Package layerkeys records which KEKs open a layer, by the layer's diff ID.
//
// containerd shares an unpacked layer among all images whose configurations name its diff
// ID, and anybody can write a configuration. So what a container must be allowed to use
// follows from the diff IDs of its image, and not from the image's manifest.
//
// An entry only ever demands more. There are three kinds, by what is known:
//
//   - Decrypted: the encrypted blob was decrypted on this node, its HMAC matched, and the
//     plain layer had the diff ID. Only somebody who has the layer's content can make a blob
//     of which that is true, so any KEK of any such blob is enough to use the layer.
//   - Sealed: the layer's key has sealed that the blob has the diff ID, and it is mounted
//     lazily, not read as a whole.
//   - Claimed: a manifest says so that was in containerd's content store when the record
//     was begun.
//
// What is sealed or claimed may be false, so it never loosens anything: a container has to
// be allowed for each such blob, until the layer is decrypted once.
package layerkeys

import (
	"bytes"
	"cmp"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/ctrlplane/pilot/internal/openedby"
)

// KEK is a version of a KEK. Version is 0 where the broker has no versions.
type KEK struct {
	ID      string `json:"id"`
	Version int    `json:"version,omitempty"`
}

// Basis is what is known of an encrypted blob and its diff ID.
type Basis string

// What is known: see the package's comment.
const (
	Decrypted Basis = "decrypted"
	Sealed    Basis = "sealed"
	Claimed   Basis = "claimed"
)

// Blob is an encrypted blob of a layer. Each of its KEKs, and each other key, opens it.
type Blob struct {
	Digest digest.Digest `json:"digest"`
	Basis  Basis         `json:"basis"`
	KEKs   []KEK         `json:"keks,omitempty"`
	// Other reports that a key opens it that is not a KEK of the broker's.
	Other bool `json:"other,omitempty"`
	// Public are those of the KEKs that have opened what others than those with the right to
	// wrap could have wrapped: see [openedby.Opener].
	Public []KEK `json:"public,omitempty"`
	// Vouched are those of the KEKs with which somebody who may wrap with them has wrapped
	// the digest of the layer's content together with the key. What the others open may be
	// something else that was encrypted under the same key.
	Vouched []KEK `json:"vouched,omitempty"`
	// Plain is the digest of the plain blob, or "" where it was not computed.
	Plain digest.Digest `json:"plain,omitempty"`
	// Size is that of the uncompressed layer in bytes, where it was decrypted.
	Size int64 `json:"size,omitempty"`
	// Fingerprint is that of the layer key, 32 bytes, or nil if it was never unwrapped.
	Fingerprint []byte `json:"fingerprint,omitempty"`
}

// Opened returns a blob whose key was unwrapped, with that key's fingerprint.
func Opened(blob digest.Digest, basis Basis, by openedby.Opener, fingerprint []byte) Blob {
	b := Blob{Digest: blob, Basis: basis, Fingerprint: fingerprint}
	b.Open(by)
	return b
}

// Open adds what opens the blob.
func (b *Blob) Open(by openedby.Opener) {
	kek := KEK{by.KEK, by.Version}
	is := func(k KEK) bool { return k == kek }
	switch {
	case by.KEK == "":
		b.Other = true
	case !slices.Contains(b.KEKs, kek):
		b.KEKs = append(slices.Clip(b.KEKs), kek)
		if by.Public {
			b.Public = append(slices.Clip(b.Public), kek)
		}
	case !by.Public:
		b.Public = slices.DeleteFunc(slices.Clone(b.Public), is) // it was wrapped in both ways
	}
	if by.Vouches && !slices.Contains(b.Vouched, kek) {
		b.Vouched = append(slices.Clip(b.Vouched), kek)
	}
}

// Merge adds what is known of the same layer otherwise.
func (b *Blob) Merge(o Blob) {
	for _, k := range o.KEKs {
		b.Open(openedby.Opener{KEK: k.ID, Version: k.Version, Public: slices.Contains(o.Public, k), Vouches: slices.Contains(o.Vouched, k)})
	}
	b.Other = b.Other || o.Other
	b.Size = max(b.Size, o.Size)
	b.Plain = cmp.Or(b.Plain, o.Plain)
}

// trim forgets the first of more KEKs than maxKEKs.
func (b *Blob) trim() {
	n := len(b.KEKs) - maxKEKs
	if n <= 0 {
		return
	}
	gone := b.KEKs[:n]
	isGone := func(k KEK) bool { return slices.Contains(gone, k) }
	b.KEKs = b.KEKs[n:]
	b.Public = slices.DeleteFunc(slices.Clone(b.Public), isGone)
	b.Vouched = slices.DeleteFunc(slices.Clone(b.Vouched), isGone)
}

// Layer is what is known of a diff ID. Callers must not change it.
type Layer struct {
	Blobs []Blob `json:"blobs"`
	// Seen is when the record learned of it last.
	Seen time.Time `json:"seen"`
}

// plainLayer are the plain blobs of which it is known that their content has a diff ID.
type plainLayer struct {
	Blobs []digest.Digest `json:"blobs"`
	Seen  time.Time       `json:"seen"`
}

// Bounds of what is kept for one diff ID.
const (
	maxBlobs = 256 // a layer that is encrypted anew for each build of an image
	maxKEKs  = 256 // of a blob
)

// Record is the record of a node. It is safe for concurrent use. It is in memory, and in
// one file, which is written anew for each change: see [Open].
type Record struct {
	isCopy bool // see Read
	path   string
	lock   *os.File
	now    func() time.Time

	mu      sync.RWMutex
	layers  map[digest.Digest]Layer
	plain   map[digest.Digest]plainLayer
	begun   bool   // the claims of earlier images are in it
	changes uint64 // counts changes

	saving sync.Mutex  // held while the file is written
	saved  uint64      // changes that are in the file
	inode  fs.FileInfo // of the file as it was written
}

// Layer returns what is known of a diff ID, and false if nothing is: no encrypted layer
// with it is known here.
func (r *Record) Layer(diffID digest.Digest) (Layer, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	l, ok := r.layers[diffID]
	return l, ok
}

// Add records what is known of an encrypted blob, and returns once that is on the disk.
// What is known of the blob already is kept, except what is known better now.
func (r *Record) Add(diffID digest.Digest, b Blob) error {
	r.mu.Lock()
	change := r.add(diffID, b)
	r.mu.Unlock()
	return r.save(change)
}

// add adds with r.mu held, and returns the change that a caller has to wait for.
func (r *Record) add(diffID digest.Digest, b Blob) uint64 {
	l, now := r.layers[diffID], r.now()
	blobs := l.with(b)
	if slices.EqualFunc(blobs, l.Blobs, Blob.equal) && now.Sub(l.Seen) < refreshInterval {
		return r.changes // which may not be saved yet
	}
	r.layers[diffID] = Layer{Blobs: blobs, Seen: now}
	r.changes++
	return r.changes
}

// refreshInterval is how much older Layer.Seen may be than the truth.
const refreshInterval = time.Hour

// with returns the blobs of the layer once more is known of one.
func (l Layer) with(b Blob) []Blob {
	// Those that say the same of the same blob become one. What is claimed stays apart, as
	// another manifest may name a key that does not open it.
	same := func(o Blob) bool {
		return o.equal(b) || o.Digest == b.Digest && (o.Basis == b.Basis && b.Basis == Decrypted ||
			len(b.Fingerprint) > 0 && bytes.Equal(o.Fingerprint, b.Fingerprint))
	}
	blobs := make([]Blob, 0, len(l.Blobs)+1)
	at := -1
	for _, o := range l.Blobs {
		switch {
		case same(o) && at < 0:
			more := b
			if b = o; more.Basis == Decrypted {
				b.Basis = Decrypted
			}
			if len(more.Fingerprint) > 0 {
				b.Fingerprint = more.Fingerprint
			}
			b.Merge(more)
			at = len(blobs)
			blobs = append(blobs, b)
		case same(o):
		case o.Digest == b.Digest && b.Basis == Decrypted:
			// It was by others' word.
		case o.Digest == b.Digest && o.Basis == Decrypted:
			return l.Blobs
		default:
			blobs = append(blobs, o)
		}
	}
	if at < 0 {
		at = len(blobs)
		blobs = append(blobs, b)
	}
	blobs[at].trim()
	if len(blobs) > maxBlobs {
		blobs = slices.Delete(blobs, superfluous(blobs), superfluous(blobs)+1)
	}
	return blobs
}

// superfluous returns which of the blobs says least: the first of those whose keys open
// others too, so that nobody can push another's out.
func superfluous(blobs []Blob) int {
	uses := map[string]int{} // in all versions, of which somebody can make many
	for _, b := range blobs {
		ids := map[string]bool{}
		for _, k := range b.KEKs {
			ids[k.ID] = true
		}
		for id := range ids {
			uses[id]++
		}
	}
	return max(0, slices.IndexFunc(blobs, func(b Blob) bool {
		return !slices.ContainsFunc(b.KEKs, func(k KEK) bool { return uses[k.ID] == 1 })
	}))
}

func (b Blob) equal(o Blob) bool {
	return b.Digest == o.Digest && b.Basis == o.Basis && b.Other == o.Other && b.Size == o.Size && b.Plain == o.Plain && slices.Equal(b.KEKs, o.KEKs) &&
		slices.Equal(b.Public, o.Public) && slices.Equal(b.Vouched, o.Vouched) && bytes.Equal(b.Fingerprint, o.Fingerprint)
}

// Withdraw removes what was sealed of a blob with the key of a fingerprint, once it is known to
// be false. That says nothing about what others have sealed or claim of it.
func (r *Record) Withdraw(diffID, blob digest.Digest, fingerprint []byte) error {
	r.mu.Lock()
	l := r.layers[diffID]
	kept := slices.DeleteFunc(slices.Clone(l.Blobs), func(b Blob) bool {
		return b.Digest == blob && b.Basis == Sealed && bytes.Equal(b.Fingerprint, fingerprint)
	})
	change := r.changes
	if len(kept) < len(l.Blobs) {
		if l.Blobs = kept; len(kept) > 0 {
			r.layers[diffID] = l
		} else {
			delete(r.layers, diffID)
		}
		r.changes++
		change = r.changes
	}
	r.mu.Unlock()
	return r.save(change)
}

// AddPlain records that the content of a plain blob has a diff ID. It does not wait for the
// disk: a fact that is lost can be found again, and plain layers must not depend on it.
func (r *Record) AddPlain(blob, diffID digest.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l, now := r.plain[diffID], r.now()
	known := slices.Contains(l.Blobs, blob)
	if known && now.Sub(l.Seen) < refreshInterval {
		return
	}
	if !known {
		if l.Blobs = append(slices.Clip(l.Blobs), blob); len(l.Blobs) > maxBlobs {
			l.Blobs = l.Blobs[1:]
		}
	}
	r.plain[diffID] = plainLayer{l.Blobs, now}
	r.changes++
}

// IsPlain reports whether the content of a plain blob is known to have a diff ID.
func (r *Record) IsPlain(blob, diffID digest.Digest) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return slices.Contains(r.plain[diffID].Blobs, blob)
}

// IsDiffID reports whether a digest is known to be that of some content. It may be a chain ID
// nevertheless, which is the digest of a text.
func (r *Record) IsDiffID(d digest.Digest) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	_, isPlain := r.plain[d]
	return isPlain || slices.ContainsFunc(r.layers[d].Blobs, func(b Blob) bool { return b.Basis == Decrypted })
}

// Begin adds the claims of images that were unpacked without the record.
func (r *Record) Begin(claims func(add func(diffID digest.Digest, b Blob))) error {
	r.mu.Lock()
	claims(func(diffID digest.Digest, b Blob) { r.add(diffID, b) })
	if !r.begun {
		r.begun = true
		r.changes++
	}
	change := r.changes
	r.mu.Unlock()
	return r.save(change)
}

// Begun reports whether the claims of earlier images are in the record.
func (r *Record) Begun() bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.begun
}

// DiffIDs returns all diff IDs that the record has something of.
func (r *Record) DiffIDs() []digest.Digest {
	r.mu.RLock()
	defer r.mu.RUnlock()
	all := slices.Collect(maps.Keys(r.layers))
	all = slices.AppendSeq(all, maps.Keys(r.plain))
	slices.Sort(all)
	return slices.Compact(all)
}

// Forget removes what was last seen before a time and of whose diff ID no snapshot is
// there, and returns of how many layers and plain blobs.
func (r *Record) Forget(before time.Time, live func(diffID digest.Digest) bool) (n int, err error) {
	r.mu.Lock()
	was := len(r.layers) + len(r.plain)
	maps.DeleteFunc(r.layers, func(d digest.Digest, l Layer) bool { return l.Seen.Before(before) && !live(d) })
	maps.DeleteFunc(r.plain, func(d digest.Digest, l plainLayer) bool { return l.Seen.Before(before) && !live(d) })
	if n = was - len(r.layers) - len(r.plain); n > 0 {
		r.changes++
	}
	change := r.changes
	r.mu.Unlock()
	return n, r.save(change)
}

func (r *Record) wrap(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("record of layers %s: %w", r.path, err)
}

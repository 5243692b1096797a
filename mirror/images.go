package mirror

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/image"
)

const (
	// maxImages bounds what is remembered of images, in bytes: of their plain manifests
	// and the annotations of their layers, some 20 KB for an image of ten layers.
	maxImages = 16 << 20
	// imageCost is what an image takes besides those, and each digest of it.
	imageCost = 512
	// keysTTL is how long the keys of an image are not tried again before its plain
	// manifests are given out, for the several requests of one pull. It adds to how
	// long a KEK is in memory.
	keysTTL = 10 * time.Second
)

// plainImage is an image in one repository, as it is once it is decrypted.
type plainImage struct {
	image.Plaintext
	repository string
	encrypted  ocispec.Descriptor // in the registry
	tried      atomic.Int64       // when its keys were unwrapped last, in Unix nanoseconds
	cost       int
	used       time.Time
}

func newPlainImage(repository string, encrypted ocispec.Descriptor, p image.Plaintext) *plainImage {
	i := &plainImage{Plaintext: p, repository: repository, encrypted: encrypted, cost: imageCost}
	i.tried.Store(time.Now().UnixNano())
	for _, doc := range p.Documents {
		i.cost += imageCost + len(doc.Content)
	}
	for d, layer := range p.Layers {
		// Its data and URLs are not used, and may be large.
		layer = ocispec.Descriptor{MediaType: layer.MediaType, Digest: layer.Digest, Size: layer.Size, Annotations: layer.Annotations}
		p.Layers[d] = layer
		i.cost += imageCost
		for key, value := range layer.Annotations {
			i.cost += len(key) + len(value)
		}
	}
	return i
}

// isPlain reports whether nothing of the image is encrypted.
func (i *plainImage) isPlain() bool { return i.Target.Digest == i.encrypted.Digest }

// has reports whether a digest is that of a plain document or layer of the image.
func (i *plainImage) has(d digest.Digest) bool {
	_, isDocument := i.Documents[d]
	_, isLayer := i.Layers[d]
	return isDocument || isLayer
}

// keysTried reports whether the keys were unwrapped so recently that this is not needed
// again.
func (i *plainImage) keysTried() bool {
	return time.Since(time.Unix(0, i.tried.Load())) < keysTTL
}

// images remember what encrypted images of each repository decrypt to. That gives nobody
// access: the registry is asked for the encrypted image each time, and the keys are
// unwrapped again.
type images struct {
	mu    sync.Mutex
	by    map[imageKey]*plainImage
	total int // of the costs
}

// imageKey is a digest of an image: its own while encrypted, one of its plain documents,
// or one of its plain layers.
type imageKey struct {
	repository string
	digest     digest.Digest
}

// find returns the image that a digest is of, or nil.
func (s *images) find(repository string, d digest.Digest) *plainImage {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := s.by[imageKey{repository, d}]
	if i != nil {
		i.used = time.Now()
	}
	return i
}

// add remembers an image, and forgets those that were not used for the longest time.
func (s *images) add(i *plainImage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.by == nil {
		s.by = map[imageKey]*plainImage{}
	}
	if had := s.by[imageKey{i.repository, i.encrypted.Digest}]; had != nil {
		s.remove(had)
	}
	i.used = time.Now()
	s.total += i.cost
	for _, key := range i.keys() {
		s.by[key] = i
	}
	for s.total > maxImages {
		oldest := i
		for _, other := range s.by {
			if other.used.Before(oldest.used) {
				oldest = other
			}
		}
		if oldest == i {
			break // it is alone
		}
		s.remove(oldest)
	}
}

// prefer has the digests of an image lead to it, where other images have the same: an image
// that somebody has put beside it must not stand in its way.
func (s *images) prefer(i *plainImage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.by[imageKey{i.repository, i.encrypted.Digest}] != i {
		return // it was forgotten
	}
	for _, key := range i.keys() {
		s.by[key] = i
	}
}

// forget forgets an image that the registry no longer has.
func (s *images) forget(i *plainImage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.by[imageKey{i.repository, i.encrypted.Digest}] == i {
		s.remove(i)
	}
}

func (s *images) remove(i *plainImage) {
	s.total -= i.cost
	for _, key := range i.keys() {
		if s.by[key] == i {
			delete(s.by, key)
		}
	}
}

func (i *plainImage) keys() []imageKey {
	list := []imageKey{{i.repository, i.encrypted.Digest}}
	for d := range i.Documents {
		list = append(list, imageKey{i.repository, d})
	}
	for d := range i.Layers {
		list = append(list, imageKey{i.repository, d})
	}
	return list
}

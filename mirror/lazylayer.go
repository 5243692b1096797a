package mirror

import (
	"context"
	"crypto/cipher"
	"errors"
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/internal/layerbudget"
	"github.com/ctrlplane/pilot/processor"
)

// lazyLayer is an encrypted layer of which parts are served. Its tail was verified, and the
// table of contents in it.
type lazyLayer struct {
	desc   ocispec.Descriptor
	sealed image.Lazy
	head   []byte // the first bytes, which are requested before each mount

	tail []byte    // under lazy.mu: those from sealed.TailOffset on, or nil: not in memory
	used time.Time // under lazy.mu

	proof   atomic.Pointer[proof]  // nil: the layer was not read as a whole
	sought  atomic.Pointer[sought] // nil: its repository has given it
	vouched []ocispec.Descriptor   // under lazy.mu: other blobs whose seals say the same

	turn chan struct{} // held while the key is unwrapped again

	mu     sync.Mutex
	key    *processor.LayerKey // nil: cleared
	fresh  time.Time           // until when it is used as it is
	usable time.Time           // until when it is used if no key provider answers
	noEnd  bool                // there is no such limit

	openedBy    processor.Opener // of the key
	fingerprint []byte           // of the key

	expiry *time.Timer // clears it
}

func newLazyLayer(desc ocispec.Descriptor) *lazyLayer {
	return &lazyLayer{desc: desc, turn: make(chan struct{}, 1)}
}

// sameLayer reports whether two descriptors have the same key and seal of the same layer.
func sameLayer(a, b ocispec.Descriptor) bool {
	return a.Digest == b.Digest && a.Size == b.Size && a.MediaType == b.MediaType && maps.Equal(a.Annotations, b.Annotations)
}

func (l *lazyLayer) isOf(desc ocispec.Descriptor) bool { return sameLayer(l.desc, desc) }

// keyStream returns what decrypts the layer from an offset on.
func (l *lazyLayer) keyStream(offset int64) (cipher.Stream, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.key == nil {
		return nil, fmt.Errorf("layer %s: %w: it is no longer in memory", l.desc.Digest, errKeyGone)
	}
	return l.key.KeyStream(offset)
}

// errKeyGone is the error of a key that was cleared while a request was under way.
var errKeyGone = errors.New("layer key")

// isFresh reports whether the key may be used without asking a key provider.
func (l *lazyLayer) isFresh() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.key != nil && (l.noEnd || time.Now().Before(l.fresh))
}

// isUsable reports whether the key may be used while key providers do not answer.
func (l *lazyLayer) isUsable() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.key != nil && time.Now().Before(l.usable)
}

// keyLinger is how much longer a key is in memory than it is used for new requests: those
// under way may still need it.
const keyLinger = time.Minute

// set replaces the key.
func (l *lazyLayer) set(key *processor.LayerKey, fresh, usable time.Duration, noEnd bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.clearLocked()
	now := time.Now()
	l.openedBy, l.fingerprint = key.OpenedBy, key.Fingerprint()
	l.key, l.fresh, l.usable, l.noEnd = key, now.Add(fresh), now.Add(usable), noEnd
	if !noEnd {
		l.expiry = time.AfterFunc(max(fresh, usable)+keyLinger, func() { l.clearOnly(key) })
	}
}

// clear overwrites the key. Ranges that are being sent end as they are.
func (l *lazyLayer) clear() {
	if twin := l.sought.Load().twin(l); twin != nil {
		twin.clear()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.clearLocked()
}

func (l *lazyLayer) clearOnly(key *processor.LayerKey) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.key == key {
		l.clearLocked()
	}
}

func (l *lazyLayer) clearLocked() {
	if l.expiry != nil {
		l.expiry.Stop()
		l.expiry = nil
	}
	if l.key != nil {
		l.key.Clear()
		l.key = nil
	}
}

// unwrapLazy unwraps a layer's key, and reads what it has sealed.
//
// For how long the key is used then depends on who has unwrapped it. If the broker was
// asked, its consent counts as long as that to a KEK. If not, the KEK was in memory, nobody
// here knows for how long, and the next unwrapping costs little.
func (m *Mirror) unwrapLazy(ctx context.Context, layer *lazyLayer) error {
	ctx = layerbudget.With(ctx)
	key, err := m.unwrap(ctx, layer.desc)
	if err != nil {
		return err
	}
	sealed, err := image.SealedLazy(key, layer.desc)
	if err == nil && layer.sealed != (image.Lazy{}) && layer.sealed != sealed {
		err = fmt.Errorf("another of its wrapped keys has sealed something else: %w", processor.ErrTampered)
	}
	if err != nil {
		key.Clear()
		reason := reasonTampered
		if errors.Is(err, image.ErrNotSealed) {
			reason = reasonNotSealed
		}
		return &notLazy{reason, err}
	}
	if layer.sealed == (image.Lazy{}) {
		layer.sealed = sealed // nobody else has the layer yet
	}
	if sealed.IsWrapped(key) {
		key.OpenedBy = key.OpenedBy.Vouching(key.Digest)
	}
	ttl, grace := m.conf.LayerKeyLifetime()
	switch {
	case layerbudget.Taken(ctx) == 0:
		fresh := keysTTL
		if ttl > 0 {
			fresh = min(fresh, ttl)
		}
		layer.set(key, fresh, 0, false)
	case ttl <= 0:
		layer.set(key, 0, 0, true)
	default:
		layer.set(key, ttl, ttl+grace, false)
	}
	return nil
}

// refresh makes sure that the key of a layer may be used.
func (m *Mirror) refresh(ctx context.Context, layer *lazyLayer) error {
	if layer.isFresh() {
		return nil
	}
	leave, err := enter(ctx, layer.turn)
	if err != nil {
		return err
	}
	defer leave()
	if layer.isFresh() {
		return nil // another request has asked meanwhile
	}
	// Others wait for this too.
	err = m.unwrapLazy(context.WithoutCancel(ctx), layer)
	if err == nil {
		return nil
	}
	if m.reasonOf(err) == reasonKeys && layer.isUsable() {
		logrus.WithError(err).WithFields(ofLayer(layer.desc)).Debug("layer key used past its kek-cache-ttl")
		return nil
	}
	layer.clear()
	return err
}

// find returns a layer that is remembered, or nil.
func (l *lazy) find(d digest.Digest) *lazyLayer {
	l.mu.Lock()
	defer l.mu.Unlock()
	layer := l.layers[d]
	if layer != nil {
		layer.used = time.Now()
	}
	return layer
}

// add remembers a layer, and forgets those that were not used for the longest time.
func (l *lazy) add(layer *lazyLayer) {
	l.mu.Lock()
	defer l.mu.Unlock()
	d := layer.desc.Digest
	if had := l.layers[d]; had != nil {
		l.remove(had)
	}
	layer.used = time.Now()
	l.layers[d] = layer
	l.tails += len(layer.tail)
	for len(l.layers) > maxLazyLayers {
		l.remove(l.oldest(func(other *lazyLayer) bool { return other != layer }))
	}
	l.shrink(layer)
	l.measure()
}

// remove forgets a layer. Requests that have it go on.
func (l *lazy) remove(layer *lazyLayer) {
	l.tails -= len(layer.tail)
	layer.tail = nil
	delete(l.layers, layer.desc.Digest)
	layer.clear()
}

// oldest returns the layer that was not used for the longest time among those that may be
// taken, or nil.
func (l *lazy) oldest(may func(*lazyLayer) bool) (oldest *lazyLayer) {
	for _, layer := range l.layers {
		if may(layer) && (oldest == nil || layer.used.Before(oldest.used)) {
			oldest = layer
		}
	}
	return oldest
}

// measure sets the metrics of what is remembered.
func (l *lazy) measure() {
	l.metrics.layers.Set(float64(len(l.layers)))
	l.metrics.tails.Set(float64(l.tails))
}

// ForgetKeys overwrites all layer keys in memory, such as when pilot drops its KEKs.
func (m *Mirror) ForgetKeys() {
	if m.lazy == nil {
		return
	}
	m.lazy.mu.Lock()
	defer m.lazy.mu.Unlock()
	for _, layer := range m.lazy.layers {
		layer.clear()
	}
}

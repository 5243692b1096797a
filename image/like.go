package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/wireformat"
	"github.com/ctrlplane/pilot/processor"
)

// Like is an earlier encrypted image, of which [Encrypt] takes over layers, with their
// ciphertext and their keys, which are wrapped for the new recipients alone.
//
// Those who can write that image must not choose what the new one holds. So a layer is
// taken over only if its key names the same plain layer, and that is read and encrypted
// with the key once more to see that it gives the same blob. It is not read if two things
// hold: the key is wrapped by the method A256GCMKW with a KEK of the new recipients and
// has sealed the blob, so those who made it may use that KEK, or could decrypt the layer;
// and nodes compare what they unpack of it with a diff ID in the image's configuration.
type Like struct {
	// Layers are its layers.
	Layers []ocispec.Descriptor
	// Take brings the blob of one of Layers into the store, if it is not there. If it
	// fails, the layer is encrypted anew.
	Take func(ctx context.Context, blob ocispec.Descriptor) error
}

// Reused counts layers that were taken over from an earlier image.
type Reused struct {
	Layers int   `json:"layers"`
	Bytes  int64 `json:"bytes"`
	// Failed says, each reason once, why layers that may have been the same could not be
	// taken over: their keys did not unwrap, or their blobs are missing.
	Failed []error `json:"-"`
}

// maxFailed bounds the keys that did not unwrap and the layers that were read in vain,
// of which those who can write the earlier image can make any number. Beyond it no more
// are tried.
const maxFailed = 16

// earlier is the image of [Options.Like], or nil. Its methods may be called from
// several goroutines.
type earlier struct {
	*Like
	to processor.Recipients

	mu     sync.Mutex
	keys   map[int]earlierKey // by index into Layers
	denied map[string]bool    // by recipients
	takes  map[digest.Digest]func() error
	reused Reused
}

// earlierKey is the key of an earlier layer.
type earlierKey struct {
	*processor.LayerKey // nil if it did not unwrap
	// trusted is set if those who made the layer may use a KEK of the new recipients, or
	// could decrypt the layer before.
	trusted bool
}

func newEarlier(like *Like, to processor.Recipients) *earlier {
	if like == nil {
		return nil
	}
	// Platforms have layers in common.
	seen := make(map[string]bool)
	layers := slices.DeleteFunc(slices.Clone(like.Layers), func(l ocispec.Descriptor) bool {
		key := planKey(l)
		had := seen[key]
		seen[key] = true
		return had
	})
	return &earlier{Like: &Like{layers, like.Take}, to: to, keys: map[int]earlierKey{}, denied: map[string]bool{}, takes: map[digest.Digest]func() error{}}
}

// clear overwrites the keys.
func (e *earlier) clear() {
	if e == nil {
		return
	}
	for _, k := range e.keys {
		if k.LayerKey != nil {
			k.Clear()
		}
	}
}

func (e *earlier) result() Reused {
	if e == nil {
		return Reused{}
	}
	return e.reused
}

// fail notes why a layer can't be taken over.
func (e *earlier) fail(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.note(err)
}

func (e *earlier) failedTooOften() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.reused.Failed) >= maxFailed
}

// note is fail with e locked.
func (e *earlier) note(err error) {
	if !slices.ContainsFunc(e.reused.Failed, func(had error) bool { return had.Error() == err.Error() }) {
		e.reused.Failed = append(e.reused.Failed, err)
	}
}

// find returns the key and the layer of the earlier image that is the encrypted form of
// the plain layer desc, or nil if there is none. The key is e's. The error is ctx's, or
// that of reading the plain layer.
func (e *earlier) find(ctx context.Context, w *work, desc ocispec.Descriptor) (earlierKey, ocispec.Descriptor, error) {
	var none ocispec.Descriptor
	if e == nil {
		return earlierKey{}, none, nil
	}
	for i, l := range e.Layers {
		if l.Size != desc.Size || !processor.IsEncrypted(l.MediaType) || !processor.HasRecipients(l) {
			continue
		}
		k := e.key(ctx, i)
		if ctx.Err() != nil {
			return earlierKey{}, none, ctx.Err()
		}
		if k.LayerKey == nil || k.Digest != desc.Digest {
			continue
		}
		if !k.trusted || !w.checked[desc.Digest] {
			if e.failedTooOften() {
				break
			}
			switch same, err := reproduces(ctx, w, desc, k.LayerKey, l); {
			case err != nil:
				return earlierKey{}, none, err
			case !same:
				e.fail(fmt.Errorf("layer %s: it is not the encrypted form of %s, as its key says: it was tampered with", l.Digest, desc.Digest))
				continue
			}
		}
		return k, l, nil
	}
	return earlierKey{}, none, nil
}

// reproduces reads the plain layer desc and reports whether key encrypts it to l.
func reproduces(ctx context.Context, w *work, desc ocispec.Descriptor, key *processor.LayerKey, l ocispec.Descriptor) (same bool, err error) {
	err = w.read(ctx, desc, func(r io.Reader) error {
		d, err := key.Reproduce(r)
		same = d == l.Digest
		if errors.Is(err, processor.ErrTampered) {
			err = nil
		}
		return err
	})
	return same && err == nil, err
}

// key unwraps the key of layer i. Layers with recipients of which a key provider failed
// before are not tried, so that there is one denial in the broker's audit log, or one
// wait for a broker that is down, and not one for each layer.
func (e *earlier) key(ctx context.Context, i int) earlierKey {
	e.mu.Lock()
	defer e.mu.Unlock()
	if k, ok := e.keys[i]; ok {
		return k
	}
	l := e.Layers[i]
	who := recipientsOf(l.Annotations)
	for i := range who {
		who[i].Version = 0
	}
	of := joinRecipients(who)
	if e.denied[of] || len(e.reused.Failed) >= maxFailed {
		return earlierKey{}
	}
	k, err := e.unwrap(ctx, l, len(who) > 1)
	e.keys[i] = k
	if err != nil {
		e.note(fmt.Errorf("layer %s: %w", l.Digest, err))
		e.denied[of] = slices.ContainsFunc(who, func(r Recipient) bool { return strings.HasPrefix(r.Scheme, providerScheme) })
	}
	return k
}

// unwrap unwraps the key of a layer, from what is wrapped for a new recipient, or from
// the others, if there are more.
func (e *earlier) unwrap(ctx context.Context, l ocispec.Descriptor, more bool) (earlierKey, error) {
	ctx, cancel := context.WithTimeout(ctx, keyTimeout)
	defer cancel()
	if own := e.own(l); own != nil {
		key, err := unwrapFrom(ctx, own, e.to.Keys, l)
		if err == nil {
			return earlierKey{key, isSealed(key, l)}, nil
		}
		if !more {
			return earlierKey{}, err
		}
	}
	key, err := processor.Unwrap(ctx, e.to.Keys, l)
	return earlierKey{LayerKey: key}, err
}

// own returns the key that is wrapped with a KEK of the new recipients, which takes the
// KEK, or the broker's permission to wrap with it. Anybody can wrap for a public key, and
// some KMSs have those, behind the method copilot.
func (e *earlier) own(l ocispec.Descriptor) *wrapped {
	for _, scheme := range schemesOf(l.Annotations) {
		name, ok := strings.CutPrefix(scheme, providerScheme)
		if !ok {
			continue
		}
		for _, v := range values(scheme, l.Annotations[keysPrefix+scheme]) {
			for i, k := range v.keys {
				if k.method == wireformat.MethodA256GCMKW && slices.ContainsFunc(e.to.Parameters[name], func(kek []byte) bool { return string(kek) == k.KEK }) {
					return &v.keys[i]
				}
			}
		}
	}
	return nil
}

// take brings the blob of an earlier layer into the store, once if several plain layers
// become it.
func (e *earlier) take(ctx context.Context, blob ocispec.Descriptor) error {
	e.mu.Lock()
	do := e.takes[blob.Digest]
	if do == nil {
		do = sync.OnceValue(func() error { return e.Take(ctx, blob) })
		e.takes[blob.Digest] = do
	}
	e.mu.Unlock()
	if err := do(); err != nil {
		err = fmt.Errorf("layer %s can't be taken over: %w", blob.Digest, err)
		e.fail(err)
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.reused.Layers++
	e.reused.Bytes += blob.Size
	return nil
}

// noteChecked notes, when planning, which layers of a manifest nodes unpack, and compare
// with the diff IDs in its configuration, and those diff IDs. A layer that another manifest
// has too is checked only if that is so there as well.
func (w *work) noteChecked(ctx context.Context, desc ocispec.Descriptor, m ocispec.Manifest) {
	if w.mode != encrypting || !w.dry || w.Like == nil && !slices.ContainsFunc(m.Layers, isMarked) {
		return
	}
	ids := w.diffIDsOf(ctx, desc, m)
	for i, l := range m.Layers {
		checked := ids != nil && images.IsLayerType(l.MediaType) && strings.Contains(l.MediaType, ".tar")
		before, had := w.checked[l.Digest]
		w.checked[l.Digest] = checked && (before || !had)
		if checked && !slices.Contains(w.diffIDs[l.Digest], ids[i]) {
			w.diffIDs[l.Digest] = append(w.diffIDs[l.Digest], ids[i])
		}
	}
}

// diffIDsOf returns the diff IDs of a manifest's layers, or nil if it is no image that has
// one for each.
func (w *work) diffIDsOf(ctx context.Context, desc ocispec.Descriptor, m ocispec.Manifest) []digest.Digest {
	if IsAttestation(desc) || !images.IsConfigType(m.Config.MediaType) {
		return nil
	}
	if info, err := w.Info(ctx, m.Config.Digest); err != nil || info.Size > maxManifest {
		return nil
	}
	ids, err := images.RootFS(ctx, w.Store, m.Config)
	if err != nil || len(ids) != len(m.Layers) {
		return nil
	}
	return ids
}

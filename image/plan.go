package image

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// plan does all of an encryption that needs no layer and writes nothing: it wraps
// the keys and makes the manifests, of the size that they will have. Only a layer
// that lost its keys is read, since its key is checked first. The result has what will
// be readable.
func (e *encryption) plan(ctx context.Context, store Store, target ocispec.Descriptor, opts Options) (Result, error) {
	opts.Progress = nil
	w := newWork(store, opts, encrypting, e.planLayer)
	w.dry = true
	result, err := w.run(ctx, target)
	e.was, e.diffIDs = w.was, w.diffIDs
	return result, err
}

// clear overwrites the layer keys.
func (e *encryption) clear() {
	for _, p := range e.plans.byLayer {
		if p.key != nil {
			p.key.Clear()
		}
	}
	e.earlier.clear()
}

// planLayer plans what becomes of a layer.
func (e *encryption) planLayer(ctx context.Context, w *work, desc ocispec.Descriptor) (change, error) {
	made, err := e.layerPlan(ctx, w, desc)
	if err == nil {
		err = readable(desc.Annotations, made.change.annotations)
	}
	if err != nil {
		return change{}, err
	}
	e.plans.add(desc, made)
	if made.key == nil && made.taken == nil {
		return made.change, nil
	}
	c := made.change
	added, err := annotationsAsLong(isMarked(desc))
	if err != nil {
		return change{}, err
	}
	c.annotations = maps.Clone(c.annotations)
	maps.Copy(c.annotations, added)
	return c, nil
}

// layerPlan wraps the key of a layer: that which it has, or that of the earlier image's
// layer, or a new one.
func (e *encryption) layerPlan(ctx context.Context, w *work, desc ocispec.Descriptor) (_ layerPlan, err error) {
	c := change{desc: desc}
	if processor.IsEncrypted(desc.MediaType) && !processor.HasRecipients(desc) {
		c.annotations, err = e.restoreKeys(ctx, w, desc)
		return layerPlan{change: c}, err
	}
	if processor.IsEncrypted(desc.MediaType) {
		ctx, cancel := context.WithTimeout(ctx, keyTimeout)
		defer cancel()
		key, err := processor.Unwrap(ctx, e.to.Keys, desc)
		if err != nil {
			return layerPlan{}, fmt.Errorf("it is encrypted already, and adding recipients takes its key: %w", err)
		}
		defer key.Clear()
		c.annotations, err = e.again(ctx, desc, key)
		return layerPlan{change: c}, err
	}
	key, blob, err := e.earlier.find(ctx, w, desc)
	if err != nil {
		return layerPlan{}, err
	}
	if key.LayerKey != nil {
		return e.reuse(ctx, desc, key, blob)
	}
	return e.newLayer(ctx, desc)
}

// newLayer plans to encrypt a plain layer with a new key.
func (e *encryption) newLayer(ctx context.Context, desc ocispec.Descriptor) (layerPlan, error) {
	key := processor.NewLayerKey(desc.Digest).WithSealed(notSealed(desc))
	c, err := e.wrap(ctx, desc, key)
	if err != nil {
		key.Clear()
		return layerPlan{}, err
	}
	return layerPlan{key: key, change: c}, nil
}

// notSealed is wrapped with the key of a layer until it is known what can be sealed of it: see
// wrapSeal. It is as long, if the layer says that it can be pulled lazily.
func notSealed(desc ocispec.Descriptor) []byte {
	if !isMarked(desc) {
		return nil
	}
	return make([]byte, sha256.Size)
}

// reuse plans to take over the blob of the earlier image, which key has encrypted. The
// recipients are the new ones alone. What was wrapped with the key of a seal is not taken
// over: it may be anybody's.
func (e *encryption) reuse(ctx context.Context, desc ocispec.Descriptor, key earlierKey, blob ocispec.Descriptor) (layerPlan, error) {
	key.LayerKey = key.WithSealed(notSealed(desc))
	c, err := e.wrap(ctx, desc, key.LayerKey)
	if err != nil {
		return layerPlan{}, err
	}
	c.desc.Digest, c.desc.Size = blob.Digest, blob.Size
	added, err := annotationsOf(key.LayerKey, blob.Digest)
	maps.Copy(c.annotations, added)
	return layerPlan{taken: &blob, takenKey: key, change: c}, err
}

// wrap wraps a layer's key for the recipients.
func (e *encryption) wrap(ctx context.Context, desc ocispec.Descriptor, key *processor.LayerKey) (change, error) {
	ctx, cancel := context.WithTimeout(ctx, keyTimeout)
	defer cancel()
	mediaType, ok := processor.EncryptedMediaType(desc.MediaType)
	if !ok {
		return change{}, fmt.Errorf("media type %s can't be encrypted", desc.MediaType)
	}
	c := change{desc: desc, sealKey: newSealKey(key)}
	c.desc.MediaType = mediaType
	var err error
	c.annotations, err = key.Wrap(ctx, e.to, nil)
	return c, err
}

// annotationsAsLong returns annotations of the length that each encrypted layer gets,
// which are known only once the layer is encrypted. If lazy is set, it may get one more.
func annotationsAsLong(lazy bool) (map[string]string, error) {
	key := processor.NewLayerKey("")
	defer key.Clear()
	encrypter, err := processor.NewEncrypter(strings.NewReader(""), key)
	if err != nil {
		return nil, err
	}
	defer encrypter.Close()
	if _, err := io.Copy(io.Discard, encrypter); err != nil {
		return nil, err
	}
	added, err := annotationsOf(key, digest.FromBytes(nil))
	if err != nil || !lazy {
		return added, err
	}
	d := digest.FromBytes(nil)
	longest := Lazy{Plain: d, Size: math.MaxInt64, DiffID: d, TOC: d, TailOffset: math.MaxInt64 - 1, Tail: d}
	added[lazyAnnotation], err = longest.annotation(key)
	return added, err
}

// layerPlan is what is to become of a layer.
type layerPlan struct {
	key    *processor.LayerKey // with which it is to be encrypted, or nil if it is
	taken  *ocispec.Descriptor // the earlier image's layer that it becomes, or nil
	change change              // without its digest, if it is still to be encrypted
	// takenKey is the key of taken, which is the earlier image's.
	takenKey earlierKey
}

// plans are those of an image's layers.
type plans struct {
	mu      sync.Mutex
	byLayer map[string]layerPlan
}

func (p *plans) add(desc ocispec.Descriptor, made layerPlan) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.byLayer == nil {
		p.byLayer = make(map[string]layerPlan)
	}
	name := planKey(desc)
	if before := p.byLayer[name].key; before != nil && before != made.key {
		before.Clear()
	}
	p.byLayer[name] = made
}

func (p *plans) of(desc ocispec.Descriptor) (layerPlan, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	made, ok := p.byLayer[planKey(desc)]
	if !ok {
		return layerPlan{}, errors.New("it was added to the store while the image was encrypted: try again")
	}
	return made, nil
}

// planKey identifies a layer. One that is encrypted may have other recipients
// elsewhere, and a plain one may not be marked for lazy pulling there.
func planKey(desc ocispec.Descriptor) string {
	key := desc.MediaType + " " + desc.Digest.String()
	if !processor.IsEncrypted(desc.MediaType) {
		if isMarked(desc) {
			key += " " + desc.Annotations[tocAnnotation]
		}
		return key
	}
	annotations := maps.Clone(desc.Annotations)
	maps.DeleteFunc(annotations, func(name, _ string) bool { return !ofEncryption(name) })
	b, err := json.Marshal(annotations)
	if err != nil {
		panic(err) // strings
	}
	return key + " " + string(b)
}

// readable checks that a layer's wrapped keys are all tried when it is decrypted,
// and that those of pilot's that it did not have before can be read.
func readable(had, has map[string]string) error {
	if err := processor.CheckWrappedKeys(has); err != nil {
		return err
	}
	for _, scheme := range schemesOf(has) {
		before := make(map[string]bool)
		for text := range strings.SplitSeq(had[keysPrefix+scheme], ",") {
			before[text] = true
		}
		for _, v := range values(scheme, has[keysPrefix+scheme]) {
			if before[v.text] {
				continue
			}
			for _, k := range v.keys {
				if k.err != nil {
					return fmt.Errorf("key provider %s returned an annotation that can't be read: %w", strings.TrimPrefix(scheme, providerScheme), k.err)
				}
			}
		}
	}
	return nil
}

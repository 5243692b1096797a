package image

import (
	"context"
	"fmt"
	"io"
	"maps"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/ctrlplane/pilot/processor"
)

// keyTimeout bounds the unwrapping of a layer's key, and its wrapping.
const keyTimeout = time.Minute

// encryption is one [Encrypt].
type encryption struct {
	to    processor.Recipients
	plans plans
	was   bool // the image has encrypted layers already
	// earlier is the image of [Options.Like], or nil.
	earlier *earlier
	diffIDs map[digest.Digest][]digest.Digest // see work

	mu      sync.Mutex
	sealed  map[digest.Digest]bool // plain layers that were sealed for lazy pulling
	notLazy []NotLazy
}

// layer encrypts a layer as planned.
func (e *encryption) layer(ctx context.Context, w *work, desc ocispec.Descriptor) (change, error) {
	p, err := e.plans.of(desc)
	if err == nil && p.taken != nil {
		if err := e.earlier.take(ctx, *p.taken); err == nil {
			return e.sealTaken(ctx, w, desc, p)
		} else if ctx.Err() != nil {
			return change{}, err
		}
		if p, err = e.newLayer(ctx, desc); err == nil {
			e.plans.add(desc, p)
		}
	}
	if err != nil || p.key == nil {
		return p.change, err
	}
	c, key := p.change, p.key
	check := e.check(ctx, w, desc)
	if check != nil {
		defer check.close()
	}
	err = w.read(ctx, desc, func(r io.Reader) error {
		if check != nil {
			r = io.TeeReader(r, check)
		}
		encrypter, err := processor.NewEncrypter(r, key)
		if err != nil {
			return err
		}
		defer encrypter.Close()
		c.desc.Digest, c.desc.Size, err = w.ingest(ctx, "encrypt-"+desc.Digest.Encoded(), c.desc.MediaType, encrypter, desc.Size, nil)
		return err
	})
	if err != nil {
		return change{}, err
	}
	added, err := annotationsOf(key, c.desc.Digest)
	maps.Copy(c.annotations, added)
	if err == nil {
		err = e.seal(ctx, w, desc, key, check, c)
	}
	return c, err
}

// decryption is one [Decrypt].
type decryption struct{ keys processor.Keys }

// layer decrypts a layer.
func (d decryption) layer(ctx context.Context, w *work, desc ocispec.Descriptor) (change, error) {
	c := change{desc: desc}
	mediaType, ok := processor.PlainMediaType(desc.MediaType)
	if !ok {
		return change{}, fmt.Errorf("media type %s is not that of an encrypted layer", desc.MediaType)
	}
	c.desc.MediaType = mediaType
	unwrapCtx, cancel := context.WithTimeout(ctx, keyTimeout)
	defer cancel()
	key, err := processor.Unwrap(unwrapCtx, d.keys, desc)
	if err != nil {
		return change{}, err
	}
	defer key.Clear()
	c.sealKey = newSealKey(key)
	err = w.read(ctx, desc, func(r io.Reader) error {
		decrypter, err := processor.NewDecrypter(r, key)
		if err != nil {
			return err
		}
		defer decrypter.Close()
		// A tool that compresses and encrypts in one step may have named the
		// digest of something else, so the digest is that of what comes out.
		// The HMAC has authenticated it by then.
		c.desc.Digest, c.desc.Size, err = w.ingest(ctx, "decrypt-"+desc.Digest.Encoded(), mediaType, decrypter, desc.Size, nil)
		return err
	})
	return c, err
}

// changeLayers changes the chosen layers, several at a time.
func (w *work) changeLayers(ctx context.Context, layers []ocispec.Descriptor, chosen []int) (map[int]change, error) {
	changes := make(map[int]change, len(chosen))
	var mu sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(maxConcurrentLayers)
	for _, i := range chosen {
		g.Go(func() error {
			c, err := w.blobs.change(ctx, w, layers[i])
			if err != nil {
				return fmt.Errorf("layer %s: %w", layers[i].Digest, err)
			}
			if c.none {
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			changes[i] = c
			return nil
		})
	}
	return changes, g.Wait()
}

// blobs remembers how each layer changed, so that a layer shared by several platforms
// is encrypted or decrypted once.
type blobs struct {
	mu   sync.Mutex
	done map[string]func() (change, error)
}

func (b *blobs) change(ctx context.Context, w *work, desc ocispec.Descriptor) (change, error) {
	b.mu.Lock()
	name := desc.MediaType + " " + desc.Digest.String()
	if w.mode != decrypting {
		name = planKey(desc) // of one that is encrypted, only annotations change
	}
	if w.checked[desc.Digest] {
		name += " checked" // and so planned again if another manifest shows that it is not
	}
	do, ok := b.done[name]
	if !ok {
		do = sync.OnceValues(func() (change, error) { return w.layer(ctx, w, desc) })
		if b.done == nil {
			b.done = make(map[string]func() (change, error))
		}
		b.done[name] = do
	}
	b.mu.Unlock()
	return do()
}

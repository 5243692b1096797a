package image

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/ctrlplane/pilot/processor"
)

// copySize is how many bytes are read from and written to the content store
// at once. containerd takes a call for each.
const copySize = 1 << 20

// keyWithin bounds the wait for a layer's key, by whatever unwraps it, and for
// its wrapping.
const keyWithin = time.Minute

// abortWithin bounds the clean-up after a failure.
const abortWithin = 5 * time.Second

// encryption is the operation of [Encrypt].
type encryption struct {
	to    processor.Recipients
	plans plans
	was   bool // the image has encrypted layers already
}

func (*encryption) mode() mode { return encrypting }

// wants every layer: one that is encrypted gets more recipients.
func (*encryption) wants(string) bool { return true }

func (e *encryption) layer(ctx context.Context, w *work, desc ocispec.Descriptor) (change, error) {
	p, err := e.plans.of(desc)
	if err != nil || p.key == nil {
		return p.change, err
	}
	c, key := p.change, p.key
	err = w.read(ctx, desc, func(r io.Reader) error {
		encrypter, err := processor.NewEncrypter(r, key)
		if err != nil {
			return err
		}
		defer encrypter.Close()
		c.desc.Digest, c.desc.Size, err = w.ingest(ctx, "encrypt-"+desc.Digest.Encoded(), encrypter, desc.Size, nil)
		return err
	})
	if err != nil {
		return change{}, err
	}
	name, value, err := key.PublicOptions()
	c.annotations[name] = value
	return c, err
}

// decryption is the operation of [Decrypt].
type decryption struct{ keys processor.Keys }

func (*decryption) mode() mode { return decrypting }

func (*decryption) wants(mediaType string) bool { return processor.IsEncrypted(mediaType) }

func (d *decryption) layer(ctx context.Context, w *work, desc ocispec.Descriptor) (change, error) {
	c := change{desc: desc}
	mediaType, ok := processor.PlainMediaType(desc.MediaType)
	if !ok {
		return change{}, fmt.Errorf("media type %s is not that of an encrypted layer", desc.MediaType)
	}
	c.desc.MediaType = mediaType
	unwrapCtx, cancel := context.WithTimeout(ctx, keyWithin)
	defer cancel()
	key, err := processor.Unwrap(unwrapCtx, d.keys, desc)
	if err != nil {
		return change{}, err
	}
	defer key.Clear()
	err = w.read(ctx, desc, func(r io.Reader) error {
		decrypter, err := processor.NewDecrypter(r, key)
		if err != nil {
			return err
		}
		defer decrypter.Close()
		// Whoever compressed and encrypted in one step named the digest of
		// something else, so what counts is the one that comes out. The
		// HMAC has authenticated it by then.
		c.desc.Digest, c.desc.Size, err = w.ingest(ctx, "decrypt-"+desc.Digest.Encoded(), decrypter, desc.Size, nil)
		return err
	})
	return c, err
}

// change does the operation to the chosen layers, several at a time.
func (w *work) change(ctx context.Context, layers []ocispec.Descriptor, chosen []int) (map[int]change, error) {
	changes := make(map[int]change, len(chosen))
	var mu sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(layersAtOnce)
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

// blobs remembers what became of a layer, so that one which several platforms
// share is encrypted or decrypted once.
type blobs struct {
	mu   sync.Mutex
	done map[string]func() (change, error)
}

func (b *blobs) change(ctx context.Context, w *work, desc ocispec.Descriptor) (change, error) {
	b.mu.Lock()
	name := desc.MediaType + " " + desc.Digest.String()
	if processor.IsEncrypted(desc.MediaType) && w.op.mode() != decrypting {
		name = planKey(desc) // only its annotations change
	}
	do, ok := b.done[name]
	if !ok {
		do = sync.OnceValues(func() (change, error) { return w.op.layer(ctx, w, desc) })
		if b.done == nil {
			b.done = make(map[string]func() (change, error))
		}
		b.done[name] = do
	}
	b.mu.Unlock()
	return do()
}

// read calls f with a reader of a blob of the size that its descriptor says.
func (w *work) read(ctx context.Context, desc ocispec.Descriptor, f func(io.Reader) error) error {
	if data := inlined(desc); data != nil {
		return f(bytes.NewReader(data))
	}
	ra, err := w.ReaderAt(ctx, desc)
	if err != nil {
		return err
	}
	defer ra.Close()
	if ra.Size() != desc.Size {
		return fmt.Errorf("its blob has %d bytes, and the manifest says %d", ra.Size(), desc.Size)
	}
	var r io.Reader = bufio.NewReaderSize(io.NewSectionReader(ra, 0, desc.Size), copySize)
	if w.Progress != nil {
		r = &progressReader{r, desc, w.Progress}
	}
	return f(r)
}

// abort removes an ingest, even if ctx is done.
func (w *work) abort(ctx context.Context, ref string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), abortWithin)
	defer cancel()
	if err := w.Abort(ctx, ref); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("abort ingest %s: %w", ref, err)
	}
	return nil
}

type progressReader struct {
	io.Reader
	desc     ocispec.Descriptor
	progress func(ocispec.Descriptor, int)
}

func (r *progressReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	r.progress(r.desc, n)
	return n, err
}

// ingest writes what r reads, size bytes, as a blob that it commits only if r
// ended without an error. It leaves nothing behind otherwise.
func (w *work) ingest(ctx context.Context, name string, r io.Reader, size int64, labels map[string]string) (_ digest.Digest, _ int64, err error) {
	ref := fmt.Sprintf("pilot-%s-%016x", name, rand.Uint64())
	cw, err := content.OpenWriter(ctx, w.Store, content.WithRef(ref), content.WithDescriptor(ocispec.Descriptor{Size: size}))
	if err != nil {
		return "", 0, err
	}
	defer func() {
		err = errors.Join(err, cw.Close())
		if err != nil {
			err = errors.Join(err, w.abort(ctx, ref))
		}
	}()
	buffered := bufio.NewWriterSize(writerOnly{cw}, copySize)
	n, err := io.Copy(buffered, r)
	if err == nil {
		err = buffered.Flush()
	}
	if err == nil {
		err = ctx.Err()
	}
	if err == nil && n != size {
		err = fmt.Errorf("%d bytes came out of a layer of %d", n, size)
	}
	if err != nil {
		return "", 0, err
	}
	d := cw.Digest()
	if n == 0 {
		d = digest.FromBytes(nil) // a client of containerd learns it with the first write
	}
	var opts []content.Opt
	if len(labels) > 0 {
		opts = append(opts, content.WithLabels(labels))
	}
	err = cw.Commit(ctx, n, d, opts...)
	if errdefs.IsAlreadyExists(err) {
		err = nil
		if len(labels) > 0 {
			_, err = w.Update(ctx, content.Info{Digest: d, Labels: labels}, fieldPaths(labels)...)
		}
	}
	return d, n, err
}

func fieldPaths(labels map[string]string) []string {
	var paths []string
	for key := range labels {
		paths = append(paths, "labels."+key)
	}
	return paths
}

// writerOnly hides what else a content.Writer can do from io.Copy.
type writerOnly struct{ io.Writer }

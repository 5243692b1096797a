package image

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// abortTimeout bounds the clean-up after a failure.
const abortTimeout = 5 * time.Second

// has reports whether a blob is here.
func (w *work) has(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
	if inlined(desc) != nil {
		return true, nil
	}
	_, err := w.Info(ctx, desc.Digest)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}

// inlined returns the content of a blob that its descriptor holds, or nil.
func inlined(desc ocispec.Descriptor) []byte {
	if int64(len(desc.Data)) != desc.Size || digest.FromBytes(desc.Data) != desc.Digest {
		return nil
	}
	return desc.Data
}

// read calls f with a reader of a blob, which must have the size in its descriptor.
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
	// Layers are read in pieces of this size, which go past the buffer.
	var r io.Reader = bufio.NewReaderSize(io.NewSectionReader(ra, 0, desc.Size), processor.BufferSize)
	if w.Progress != nil {
		r = &progressReader{r, desc, w.Progress}
	}
	return f(r)
}

// abort removes an ingest, even if ctx is done.
func (w *work) abort(ctx context.Context, ref string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), abortTimeout)
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

// ingest writes what r reads, size bytes, as a blob. It commits the blob only if r ends
// without an error, and otherwise leaves nothing behind. A registry's store has to know
// manifests by their media type.
func (w *work) ingest(ctx context.Context, name, mediaType string, r io.Reader, size int64, labels map[string]string) (_ digest.Digest, _ int64, err error) {
	ref := fmt.Sprintf("pilot-%s-%016x", name, rand.Uint64())
	cw, err := content.OpenWriter(ctx, w.Store, content.WithRef(ref), content.WithDescriptor(ocispec.Descriptor{MediaType: mediaType, Size: size}))
	if err != nil {
		return "", 0, err
	}
	defer func() {
		err = errors.Join(err, cw.Close())
		if err != nil {
			err = errors.Join(err, w.abort(ctx, ref))
		}
	}()
	n, err := io.Copy(writerOnly{cw}, r) // layers in pieces of processor.BufferSize
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
		d = digest.FromBytes(nil) // containerd's client has it only after the first write
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
			if errdefs.IsFailedPrecondition(err) || errdefs.IsNotImplemented(err) {
				err = nil // the store has no labels
			}
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

// writerOnly hides the other methods of a content.Writer from io.Copy.
type writerOnly struct{ io.Writer }

// small returns a function that reads blobs to put them back into a document. All of
// them together may be no larger than a document.
func (w *work) small(ctx context.Context) func(ocispec.Descriptor) ([]byte, error) {
	left := int64(maxManifest)
	return func(desc ocispec.Descriptor) ([]byte, error) {
		if desc.Size < 0 || desc.Size > left {
			return nil, fmt.Errorf("%w: its descriptors would hold more than %d bytes", ErrLimit, maxManifest)
		}
		left -= desc.Size
		var blob []byte
		err := w.read(ctx, desc, func(r io.Reader) (err error) {
			blob, err = io.ReadAll(r)
			return err
		})
		return blob, err
	}
}

// gcLabels are the labels that keep containerd's garbage collector from what a
// document refers to.
func gcLabels(children []ocispec.Descriptor) map[string]string {
	labels := make(map[string]string)
	count := make(map[string]int)
	for _, child := range children {
		for _, key := range images.ChildGCLabels(child) {
			if strings.HasSuffix(key, ".") {
				n := count[key]
				count[key]++
				key += strconv.Itoa(n)
			}
			labels[key] = child.Digest.String()
		}
	}
	return labels
}

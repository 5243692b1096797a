package transport

import (
	"context"
	"io"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/image"
)

// Pair is the store of an image that is read in one place and written in another.
type Pair struct {
	Source
	target  Target
	written *digests
	taken   *taken
	// converted has blobs that are in neither place, or is nil.
	converted *image.Converted
}

// NewPair returns the store of an image that is read from one place and written to
// another.
func NewPair(from Source, to Target) *Pair {
	return &Pair{Source: from, target: to, written: newDigests(), taken: &taken{digests: newDigests()}}
}

// Convert converts the image target to eStargz, as [image.Convert] does, and has what is new
// in it read with the rest. Its documents are written where the new image goes if that has
// them, and its layers never are. The caller closes what it returns.
func (p *Pair) Convert(ctx context.Context, target ocispec.Descriptor, opts image.Options) (*image.Converted, error) {
	c, err := image.Convert(ctx, p, target, opts)
	p.converted = c
	return c, err
}

// isConverted reports whether a blob is in neither place.
func (p *Pair) isConverted(d digest.Digest) bool { return p.converted != nil && p.converted.Has(d) }

var _ interface {
	content.Provider
	content.InfoProvider
	content.Ingester
} = (*Pair)(nil)

// Info returns the size of a blob in either place.
func (p *Pair) Info(ctx context.Context, d digest.Digest) (content.Info, error) {
	if p.written.has(d) {
		return p.target.Info(ctx, d)
	}
	if p.isConverted(d) {
		return p.converted.Info(ctx, d)
	}
	return p.Source.Info(ctx, d)
}

// ReaderAt returns a reader of a blob in either place.
func (p *Pair) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if p.written.has(desc.Digest) {
		return p.target.ReaderAt(ctx, desc)
	}
	if p.isConverted(desc.Digest) {
		return p.converted.ReaderAt(ctx, desc)
	}
	return p.Source.ReaderAt(ctx, desc)
}

// ReadRange reads len(p) bytes of a blob of the source, at that offset. Nobody has checked
// them.
func (p *Pair) ReadRange(ctx context.Context, desc ocispec.Descriptor, b []byte, off int64) error {
	if p.isConverted(desc.Digest) {
		return p.converted.ReadRange(ctx, desc, b, off)
	}
	source, ok := p.Source.(ranged)
	if !ok {
		source = readers{p.Source}
	}
	return source.ReadRange(ctx, desc, b, off)
}

// ranged is a source that reads parts of a blob that it reads in order otherwise.
type ranged interface {
	ReadRange(ctx context.Context, desc ocispec.Descriptor, p []byte, off int64) error
}

// readers is a source whose readers read in any order.
type readers struct{ content.Provider }

func (r readers) ReadRange(ctx context.Context, desc ocispec.Descriptor, p []byte, off int64) error {
	ra, err := r.ReaderAt(ctx, desc)
	if err != nil {
		return err
	}
	defer ra.Close()
	_, err = io.ReadFull(io.NewSectionReader(ra, off, int64(len(p))), p)
	return err
}

// Writer returns a writer of a new blob in the target.
func (p *Pair) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	w, err := p.target.Writer(ctx, opts...)
	if err != nil {
		return nil, err
	}
	return noting{w, p.written}, nil
}

// Abort ends a writer.
func (p *Pair) Abort(ctx context.Context, ref string) error { return p.target.Abort(ctx, ref) }

// Update changes the labels of a blob in the target.
func (p *Pair) Update(ctx context.Context, info content.Info, fieldpaths ...string) (content.Info, error) {
	return p.target.Update(ctx, info, fieldpaths...)
}

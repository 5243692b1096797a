package transport

import (
	"context"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Pair is the store of an image that is read in one place and written in another.
type Pair struct {
	Source
	target  Target
	written *digests
	taken   *taken
}

// NewPair returns the store of an image that is read from one place and written to
// another.
func NewPair(from Source, to Target) *Pair {
	return &Pair{Source: from, target: to, written: newDigests(), taken: &taken{digests: newDigests()}}
}

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
	return p.Source.Info(ctx, d)
}

// ReaderAt returns a reader of a blob in either place.
func (p *Pair) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if p.written.has(desc.Digest) {
		return p.target.ReaderAt(ctx, desc)
	}
	return p.Source.ReaderAt(ctx, desc)
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

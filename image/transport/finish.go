package transport

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/image/registry"
)

const (
	// copiesAtOnce is how many blobs are copied at once.
	copiesAtOnce = 4
	// copySize is how many bytes are copied at once.
	copySize = 1 << 20
	// maxDepth is how deep indexes may be nested.
	maxDepth = 8
)

// Moved counts bytes.
type Moved struct {
	Written int64 `json:"written"` // of new blobs, and of manifests
	Copied  int64 `json:"copied"`  // of blobs that are as they were
	Mounted int64 `json:"mounted"` // of blobs that the registry had elsewhere
	Present int64 `json:"present"` // of blobs that were there
}

// add counts a blob.
func (m *Moved) add(origin registry.Origin, size int64) {
	switch origin {
	case registry.Present:
		m.Present += size
	case registry.Mounted:
		m.Mounted += size
	default:
		m.Copied += size
	}
}

// Finish brings what result refers to and the target lacks there, with its manifests and
// the referrers that are kept, and then gives it the target's name. Until then nothing has
// the name. A referrer that can't be kept is marked so. before is as in [Target].Name.
func (p *Pair) Finish(ctx context.Context, result image.Result, before *digest.Digest, referrers []Referrer) (Moved, error) {
	f := &finish{pair: p, same: p.target.Holds(p.Source), absent: map[digest.Digest]bool{}, seen: newDigests(), moved: p.taken.moved}
	for _, d := range result.Skipped {
		f.absent[d.Digest] = true
	}
	for _, b := range result.Plain {
		if b.Reason == image.ReasonAbsent {
			f.absent[b.Digest] = true
		}
	}
	f.moved.Written = p.written.sum()
	if err := f.bring(ctx, result.Target, 0); err != nil {
		return Moved{}, err
	}
	if err := f.referrers(ctx, referrers); err != nil {
		return Moved{}, err
	}
	if err := p.target.Name(ctx, p, result.Target, before); err != nil {
		return Moved{}, err
	}
	return f.moved, nil
}

type finish struct {
	pair   *Pair
	same   bool                   // the target has what the source has
	absent map[digest.Digest]bool // what need not be there, which the caller accepted
	seen   *digests

	mu    sync.Mutex
	moved Moved
}

// bring brings what a manifest or an index refers to.
func (f *finish) bring(ctx context.Context, desc ocispec.Descriptor, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("%s: indexes are nested more than %d deep", desc.Digest, maxDepth)
	}
	doc, err := content.ReadBlob(ctx, f.pair, desc)
	if err != nil {
		return err
	}
	var refers children
	if err := json.Unmarshal(doc, &refers); err != nil {
		return fmt.Errorf("%s: %w", desc.Digest, err)
	}
	blobs := refers.blobs()
	for _, m := range refers.Manifests {
		switch {
		case f.absent[m.Digest]:
		case !registry.IsDocument(m.MediaType):
			blobs = append(blobs, m)
		case !f.has(m) && f.seen.add(m.Digest, 0):
			if err := f.bring(ctx, m, depth+1); err != nil {
				return err
			}
			if err := f.pair.target.Document(ctx, f.pair, m); err != nil {
				return fmt.Errorf("manifest %s: %w", m.Digest, err)
			}
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(copiesAtOnce)
	for _, b := range blobs {
		if f.pair.written.has(b.Digest) || f.pair.taken.has(b.Digest) || !f.seen.add(b.Digest, 0) {
			continue
		}
		if f.has(b) {
			f.count(registry.Present, b.Size)
			continue
		}
		g.Go(func() error { return f.blob(ctx, b) })
	}
	return g.Wait()
}

// has reports whether the target has something since the source has it.
func (f *finish) has(desc ocispec.Descriptor) bool {
	return f.same && !f.pair.written.has(desc.Digest) && !f.pair.isConverted(desc.Digest)
}

// children is what a manifest or an index refers to.
type children struct {
	Manifests []ocispec.Descriptor `json:"manifests"`
	Config    *ocispec.Descriptor  `json:"config"`
	Layers    []ocispec.Descriptor `json:"layers"`
	Blobs     []ocispec.Descriptor `json:"blobs"` // of an artifact manifest
}

func (c children) blobs() []ocispec.Descriptor {
	all := slices.Concat(c.Layers, c.Blobs)
	if c.Config != nil {
		all = append(all, *c.Config)
	}
	return all
}

func (f *finish) blob(ctx context.Context, desc ocispec.Descriptor) error {
	var from content.Provider = f.pair.Source
	if f.pair.isConverted(desc.Digest) {
		if f.pair.converted.HasLayer(desc.Digest) {
			return fmt.Errorf("layer %s was converted and not encrypted: it is not written, since it would be readable", desc.Digest)
		}
		from = f.pair.converted
	}
	origin, err := f.pair.target.Copy(ctx, from, desc)
	if errdefs.IsNotFound(err) && len(desc.URLs) > 0 {
		// A foreign layer is where its URLs say. The target may have said so of an upload.
		if _, serr := f.pair.Source.Info(ctx, desc.Digest); errdefs.IsNotFound(serr) {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("blob %s: %w", desc.Digest, err)
	}
	f.count(origin, desc.Size)
	return nil
}

func (f *finish) count(origin registry.Origin, size int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.moved.add(origin, size)
}

// copyAll copies a blob, all of which is read, from the offset on that the writer has
// got to, until ctx is done.
func copyAll(ctx context.Context, w io.Writer, ra content.ReaderAt, from int64) error {
	buf := make([]byte, copySize)
	for off := int64(0); off < ra.Size(); {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		n, err := ra.ReadAt(buf[:min(copySize, ra.Size()-off)], off)
		if n == 0 && err != nil {
			return err
		}
		if skip := min(max(from-off, 0), int64(n)); skip < int64(n) {
			if _, werr := w.Write(buf[skip:n]); werr != nil {
				return werr
			}
		}
		off += int64(n)
	}
	return nil
}

// digests is a set of digests with sizes.
type digests struct {
	mu  sync.Mutex
	all map[digest.Digest]int64
}

func newDigests() *digests { return &digests{all: map[digest.Digest]int64{}} }

// add reports whether d was not there before.
func (s *digests) add(d digest.Digest, size int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, had := s.all[d]
	s.all[d] = size
	return !had
}

func (s *digests) has(d digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, had := s.all[d]
	return had
}

func (s *digests) sum() (n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, size := range s.all {
		n += size
	}
	return n
}

// noting is a writer that notes what it commits.
type noting struct {
	content.Writer
	written *digests
}

func (n noting) Commit(ctx context.Context, size int64, expected digest.Digest, opts ...content.Opt) error {
	status, err := n.Status()
	if err != nil {
		return err
	}
	d := n.Digest()
	if err := n.Writer.Commit(ctx, size, expected, opts...); err != nil {
		return err
	}
	n.written.add(d, status.Offset)
	return nil
}

package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// stallsAfter is how long a registry may send nothing of a blob.
const stallsAfter = time.Minute

var errStalled = fmt.Errorf("the registry sent nothing for %v", stallsAfter)

// sequential reads a blob by offsets that follow each other, as a [content.ReaderAt].
type sequential struct {
	body   io.ReadCloser
	size   int64
	next   int64
	ctx    context.Context // of the requests that body makes
	cancel context.CancelCauseFunc
}

// Stream returns a reader of a blob or a manifest of desc.Size bytes that nobody has
// checked: not against its digest, which callers have to do in their own way.
// A connection that breaks is made again.
func (r *Repository) Stream(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	return r.open(ctx, desc)
}

// ReadRange reads len(p) bytes of a blob, at that offset. Nobody has checked them.
func (r *Repository) ReadRange(ctx context.Context, desc ocispec.Descriptor, p []byte, off int64) error {
	s, err := r.open(ctx, desc)
	if err != nil {
		return err
	}
	defer s.Close()
	body, ok := s.body.(io.Seeker)
	if !ok {
		return fmt.Errorf("blob %s: %w", desc.Digest, errors.ErrUnsupported)
	}
	if _, err := body.Seek(off, io.SeekStart); err != nil {
		return err
	}
	_, err = io.ReadFull(s, p)
	return err
}

// Read reads on.
func (s *sequential) Read(p []byte) (int, error) {
	n, err := s.read(p)
	s.next += int64(n)
	return n, err
}

// open starts to read a blob or a manifest.
func (r *Repository) open(ctx context.Context, desc ocispec.Descriptor) (*sequential, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	body, err := r.fetcher.Fetch(ctx, desc)
	if err != nil {
		cancel(nil)
		return nil, plainly(r.spec.Hostname(), err)
	}
	return &sequential{body: body, size: desc.Size, ctx: ctx, cancel: cancel}, nil
}

func (s *sequential) ReadAt(p []byte, off int64) (int, error) {
	if off != s.next {
		return 0, fmt.Errorf("a blob of a registry is read at %d after %d bytes", off, s.next)
	}
	n := 0
	for n < len(p) {
		m, err := s.read(p[n:])
		n += m
		s.next += int64(m)
		if errors.Is(err, io.EOF) {
			return n, io.EOF
		}
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

func (s *sequential) read(p []byte) (int, error) {
	timer := time.AfterFunc(stallsAfter, func() { s.cancel(errStalled) })
	defer timer.Stop()
	n, err := s.body.Read(p)
	if err != nil && s.ctx.Err() != nil {
		err = context.Cause(s.ctx)
	}
	return n, err
}

func (s *sequential) Size() int64 { return s.size }

func (s *sequential) Close() error {
	s.cancel(nil)
	return s.body.Close()
}

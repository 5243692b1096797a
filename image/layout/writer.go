package layout

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/partfile"
)

// Writer returns a writer of a new blob.
func (l *Layout) Writer(_ context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	var o content.WriterOpts
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return nil, err
		}
	}
	root, err := l.writable()
	if err != nil {
		return nil, err
	}
	f, err := partfile.Create(root, ocispec.ImageBlobsDir, 0o666)
	if err != nil {
		return nil, err
	}
	return &writer{ref: o.Ref, file: f, started: time.Now(), digester: digest.Canonical.Digester()}, nil
}

type writer struct {
	ref      string
	file     *partfile.File // nil when it is closed
	started  time.Time
	digester digest.Digester
	n        int64
}

func (w *writer) Write(p []byte) (int, error) {
	n, err := w.file.Write(p)
	_, _ = w.digester.Hash().Write(p[:n]) // never fails
	w.n += int64(n)
	return n, err
}

func (w *writer) Digest() digest.Digest { return w.digester.Digest() }

func (w *writer) Commit(_ context.Context, size int64, expected digest.Digest, _ ...content.Opt) error {
	if w.file == nil {
		return fmt.Errorf("the writer is closed: %w", errdefs.ErrFailedPrecondition)
	}
	d := w.Digest()
	if size > 0 && size != w.n || expected != "" && expected != d {
		return fmt.Errorf("the blob has %d bytes and the digest %s, which is not what was expected: %w", w.n, d, errdefs.ErrFailedPrecondition)
	}
	name, err := BlobPath(d)
	if err != nil {
		return err
	}
	f := w.file
	w.file = nil
	return f.Commit(name)
}

func (w *writer) Status() (content.Status, error) {
	return content.Status{Ref: w.ref, Offset: w.n, StartedAt: w.started, UpdatedAt: time.Now()}, nil
}

func (w *writer) Truncate(size int64) error {
	if size != 0 {
		return errdefs.ErrNotImplemented
	}
	if _, err := w.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	w.n = 0
	w.digester.Hash().Reset()
	return w.file.Truncate(0)
}

// Close removes what was not committed.
func (w *writer) Close() error {
	if w.file == nil {
		return nil
	}
	f := w.file
	w.file = nil
	return f.Discard()
}

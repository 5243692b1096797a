package layout

import (
	"context"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/ingest"
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
	return &writer{ingest.New(o.Ref, o.Desc.Size), f}, nil
}

type writer struct {
	ingest.Blob
	file *partfile.File // nil when it is closed
}

func (w *writer) Write(p []byte) (int, error) {
	n, err := w.file.Write(p)
	w.Add(p[:n])
	return n, err
}

func (w *writer) Commit(_ context.Context, size int64, expected digest.Digest, _ ...content.Opt) error {
	if w.file == nil {
		return fmt.Errorf("the writer is closed: %w", errdefs.ErrFailedPrecondition)
	}
	if err := w.Check(size, expected); err != nil {
		return err
	}
	name, err := BlobPath(w.Digest())
	if err != nil {
		return err
	}
	f := w.file
	w.file = nil
	return f.Commit(name)
}

func (w *writer) Truncate(size int64) error {
	if size != 0 {
		return errdefs.ErrNotImplemented
	}
	if _, err := w.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	w.Reset()
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

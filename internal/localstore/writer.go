package localstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/internal/ingest"
)

// minDirect is the size of the smallest blob that is written to its file, in bytes. It
// costs some more calls than a small one over the content API.
const minDirect = 1 << 20

// copySize is how many bytes are sent over the content API at once.
const copySize = 1 << 20

// abortTimeout bounds the call that removes an ingest.
const abortTimeout = 5 * time.Second

// Writer returns a writer of a new blob. Where containerd keeps its content in files of
// this machine that we may write, a large blob is written to the file of its ingest.
// Over the content API each MiB is a call, and containerd receives, digests and writes it
// on the same cores.
//
// The ingest is one that containerd opened, and so is removed with its lease, or a day
// later without one. Until [content.Writer.Commit] the blob is nowhere else.
func (s *store) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	var o content.WriterOpts
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return nil, err
		}
	}
	held, err := s.Store.Writer(ctx, opts...)
	if err != nil || o.Desc.Digest != "" || o.Desc.Size < minDirect || s.apiOnly.Load() || runtime.GOOS != "linux" {
		return held, err
	}
	root, file, err := s.openIngest(ctx, o.Ref)
	if err != nil {
		s.forgetRoot()
		logrus.WithError(err).WithField("ref", o.Ref).Debug("blob is written over the content API")
		return held, nil
	}
	return &writer{
		Blob: ingest.New(o.Ref, o.Desc.Size), store: s, ctx: ctx, ref: o.Ref, mediaType: o.Desc.MediaType,
		held: held, root: root, file: file,
	}, nil
}

// openIngest opens the file of an ingest that containerd has just opened, and is empty. It
// returns the directory of the content store too. The directory of an ingest has the name
// of its ref's digest, and a file with the ref. Refs have a random part, so if it is
// there, the directory is that of this containerd.
func (s *store) openIngest(ctx context.Context, ref string) (root string, _ *os.File, _ error) {
	namespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return "", nil, err
	}
	if root, err = s.contentRoot(ctx); err != nil {
		return "", nil, err
	}
	// The number is 1 for each ref that is opened for the first time.
	stored := namespace + "/1/" + ref
	dir := filepath.Join(root, "ingest", digest.FromString(stored).Encoded())
	got, err := os.ReadFile(filepath.Join(dir, "ref"))
	if err != nil {
		return "", nil, err
	}
	if string(got) != stored {
		return "", nil, fmt.Errorf("%s is the ingest of %.200q", dir, got)
	}
	data := filepath.Join(dir, "data")
	found, err := os.Lstat(data)
	if err != nil {
		return "", nil, err
	}
	f, err := os.OpenFile(data, os.O_RDWR, 0)
	if err != nil {
		return "", nil, err
	}
	info, err := f.Stat()
	if err == nil && (!info.Mode().IsRegular() || info.Size() != 0 || !os.SameFile(found, info)) {
		err = fmt.Errorf("%s is no empty file", data)
	}
	if err != nil {
		f.Close()
		return "", nil, err
	}
	return root, f, nil
}

// writer writes a blob to the file of an ingest.
type writer struct {
	ingest.Blob
	store     *store
	ctx       context.Context // of the ingest
	ref       string
	mediaType string
	held      content.Writer // holds the ref, and nothing is written to it
	root      string         // of the content store
	file      *os.File       // nil once the writer is closed
}

func (w *writer) Write(p []byte) (int, error) {
	n, err := w.file.Write(p)
	w.Add(p[:n])
	return n, err
}

func (w *writer) Truncate(size int64) error {
	if size != 0 {
		return fmt.Errorf("truncate to %d bytes: %w", size, errdefs.ErrNotImplemented)
	}
	if _, err := w.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	w.Reset()
	return w.file.Truncate(0)
}

// Commit puts the blob among containerd's, under its digest, and then has containerd take
// it into the namespace, as it does with a blob that another namespace has. In between,
// containerd's garbage collector may remove it. If Commit fails in between, the ingest is
// left to its lease, for the garbage collector looks for such blobs when it removes one.
//
// If containerd does not share blobs between namespaces (content_sharing_policy), or the
// garbage collector was faster, the blob goes over the content API after all.
//
// The writer is closed then, even after an error, as containerd's is.
func (w *writer) Commit(ctx context.Context, size int64, expected digest.Digest, opts ...content.Opt) (err error) {
	if w.file == nil {
		return fmt.Errorf("the writer is closed: %w", errdefs.ErrFailedPrecondition)
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	if err := w.Check(size, expected); err != nil {
		return err
	}
	d := w.Digest()
	if err := w.publish(d); err != nil {
		return err
	}
	err = w.adopt(ctx, d, opts)
	if err == nil || errdefs.IsAlreadyExists(err) {
		w.store.unadopted.Delete(w.ref)
	}
	return err
}

// publish makes the ingest's file the blob's as well, as containerd does: on the disk, and
// read-only where that is possible.
func (w *writer) publish(d digest.Digest) error {
	info, err := w.file.Stat()
	if err != nil {
		return err
	}
	if info.Size() != w.Written() {
		return fmt.Errorf("%s has %d bytes, and %d were written", w.file.Name(), info.Size(), w.Written())
	}
	if err := w.file.Chmod(info.Mode().Perm() &^ 0o333); err != nil {
		logrus.WithError(err).WithField("digest", d).Debug("blob stays writable")
	}
	if err := w.file.Sync(); err != nil {
		return err
	}
	dir := filepath.Join(w.root, "blobs", d.Algorithm().String())
	w.store.unadopted.Store(w.ref, true)
	if err := os.Link(w.file.Name(), filepath.Join(dir, d.Encoded())); err != nil && !errors.Is(err, fs.ErrExist) {
		logrus.WithError(err).WithField("digest", d).Debug("blob not linked")
		return nil // adopt moves it
	}
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// adopt commits the blob over the content API, which only moves it if containerd does not
// find it among its blobs.
func (w *writer) adopt(ctx context.Context, d digest.Digest, opts []content.Opt) error {
	ref := w.ref + "-blob"
	cw, err := w.store.Store.Writer(ctx, content.WithRef(ref), content.WithDescriptor(ocispec.Descriptor{MediaType: w.mediaType, Digest: d, Size: w.Written()}))
	if err != nil {
		return err
	}
	defer cw.Close()
	status, err := cw.Status()
	if err != nil {
		return err
	}
	if status.Offset != w.Written() {
		w.store.apiOnly.Store(true)
		logrus.WithField("digest", d).Debug("blob is written over the content API after all")
		if _, err := io.CopyBuffer(struct{ io.Writer }{cw}, struct{ io.Reader }{io.NewSectionReader(w.file, 0, w.Written())}, make([]byte, copySize)); err != nil {
			return err
		}
	}
	return cw.Commit(ctx, w.Written(), d, opts...)
}

// Close removes the ingest.
func (w *writer) Close() error {
	if w.file == nil {
		return nil
	}
	err := w.file.Close()
	w.file = nil
	ctx, cancel := context.WithTimeout(context.WithoutCancel(w.ctx), abortTimeout)
	defer cancel()
	if err := w.store.Abort(ctx, w.ref); err != nil && !errdefs.IsNotFound(err) {
		logrus.WithError(err).WithField("ref", w.ref).Debug("ingest is left to its lease")
	}
	// After that, since containerd's writer writes to the ingest's directory when it closes.
	return errors.Join(err, w.held.Close())
}

// Abort removes an ingest, unless its blob may be among containerd's and in no namespace.
func (s *store) Abort(ctx context.Context, ref string) error {
	if _, ok := s.unadopted.Load(ref); ok {
		return nil
	}
	return s.Store.Abort(ctx, ref)
}

package archive

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/image/layout"
	"github.com/ctrlplane/pilot/internal/ingest"
	"github.com/ctrlplane/pilot/internal/partfile"
	"github.com/ctrlplane/pilot/internal/verified"
)

// blockSize is that of tar.
const blockSize = 512

// Output is an archive of an OCI image layout. Blobs are written side by side, each
// in a place that is reserved by its size; the header, which has its digest, comes last.
type Output struct {
	dir, name string

	mu      sync.Mutex
	root    *os.Root       // of dir
	file    *partfile.File // nil until the first blob is written, and when it is closed
	closed  bool
	end     int64
	pending int // blobs that are not committed
	regions map[digest.Digest]region
}

// Create returns an archive, which has that name once it is whole. A symbolic link of that
// name is followed. Nothing is made before the first blob is written. The caller closes it.
func Create(name string) (*Output, error) {
	if to, err := filepath.EvalSymlinks(name); err == nil {
		name = to
	}
	if info, err := os.Stat(name); err == nil && !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no file: give the archive another name", name)
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	dir := filepath.Dir(name)
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &Output{dir: dir, name: filepath.Base(name), root: root, regions: map[digest.Digest]region{}}, nil
}

// open makes the file. The caller holds the lock.
func (w *Output) open() error {
	if w.closed {
		return fs.ErrClosed
	}
	if w.file != nil {
		return nil
	}
	partfile.Clean(w.root, ".")
	mode := fs.FileMode(0o666)
	if replaced, err := w.root.Stat(w.name); err == nil {
		mode = replaced.Mode().Perm() // nobody else may read what takes its place
	}
	f, err := partfile.Create(w.root, ".", mode)
	if err != nil {
		return err
	}
	w.file = f
	version, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return err
	}
	return w.addAt(w.place(int64(len(version))), ocispec.ImageLayoutFile, version)
}

// header returns the header of a file, of one block.
func header(name string, size int64) ([]byte, error) {
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, Format: tar.FormatUSTAR}
	if size >= 1<<33 {
		h.Format = tar.FormatGNU // whose sizes have no such limit
	}
	var b bytes.Buffer
	if err := tar.NewWriter(&b).WriteHeader(h); err != nil {
		return nil, err
	}
	if b.Len() != blockSize {
		return nil, fmt.Errorf("the header of %s has %d bytes", name, b.Len())
	}
	return b.Bytes(), nil
}

// reserve returns a place for a file.
func (w *Output) reserve(size int64) (region, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.open(); err != nil {
		return region{}, err
	}
	return w.place(size), nil
}

// place returns a place for a file. The caller holds the lock.
func (w *Output) place(size int64) region {
	r := region{w.end + blockSize, size}
	w.end = r.offset + (size+blockSize-1)/blockSize*blockSize
	return r
}

// add writes a small file.
func (w *Output) add(name string, b []byte) error {
	r, err := w.reserve(int64(len(b)))
	if err != nil {
		return err
	}
	return w.addAt(r, name, b)
}

func (w *Output) addAt(r region, name string, b []byte) error {
	h, err := header(name, r.size)
	if err != nil {
		return err
	}
	if _, err := w.file.WriteAt(b, r.offset); err != nil {
		return err
	}
	_, err = w.file.WriteAt(h, r.offset-blockSize)
	return err
}

// Writer returns a writer of a new blob, of the size that [content.WithDescriptor]
// gives.
func (w *Output) Writer(_ context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	var o content.WriterOpts
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return nil, err
		}
	}
	r, err := w.reserve(o.Desc.Size)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	w.pending++
	w.mu.Unlock()
	return &blobWriter{Blob: ingest.New(o.Ref, r.size), archive: w, region: r}, nil
}

type blobWriter struct {
	ingest.Blob
	archive *Output
	region  region
	done    bool
}

func (b *blobWriter) Write(p []byte) (int, error) {
	if b.done {
		return 0, fs.ErrClosed
	}
	if int64(len(p)) > b.region.size-b.Written() {
		return 0, fmt.Errorf("the blob has more than %d bytes", b.region.size)
	}
	n, err := b.archive.file.WriteAt(p, b.region.offset+b.Written())
	b.Add(p[:n])
	return n, err
}

func (b *blobWriter) Commit(_ context.Context, size int64, expected digest.Digest, _ ...content.Opt) error {
	if b.done {
		return fs.ErrClosed
	}
	if err := cmp.Or(b.Check(b.region.size, ""), b.Check(size, expected)); err != nil {
		return err
	}
	d := b.Digest()
	name, err := layout.BlobPath(d)
	if err != nil {
		return err
	}
	h, err := header(name, b.region.size)
	if err != nil {
		return err
	}
	if _, err := b.archive.file.WriteAt(h, b.region.offset-blockSize); err != nil {
		return err
	}
	b.done = true
	b.archive.mu.Lock()
	defer b.archive.mu.Unlock()
	b.archive.pending--
	b.archive.regions[d] = b.region
	return nil
}

func (b *blobWriter) Truncate(size int64) error {
	if size != 0 {
		return errdefs.ErrNotImplemented
	}
	b.Reset()
	return nil
}

// Close gives up a blob that was not committed. Its place can't be given back, since others
// follow it, so it becomes a file of no image.
func (b *blobWriter) Close() error {
	if b.done {
		return nil
	}
	b.done = true
	h, err := header(fmt.Sprintf("discarded/%d", b.region.offset), b.region.size)
	if err != nil {
		return err
	}
	b.archive.mu.Lock()
	defer b.archive.mu.Unlock()
	if b.archive.file == nil {
		return nil
	}
	if _, err := b.archive.file.WriteAt(h, b.region.offset-blockSize); err != nil {
		return err
	}
	b.archive.pending--
	return nil
}

// Abort does nothing: closing a writer gives up its blob.
func (w *Output) Abort(context.Context, string) error { return nil }

// Update does nothing: an archive keeps no labels.
func (w *Output) Update(_ context.Context, info content.Info, _ ...string) (content.Info, error) {
	return info, nil
}

func (w *Output) blob(d digest.Digest) (region, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	r, ok := w.regions[d]
	if !ok {
		return region{}, fmt.Errorf("%s has no blob %s: %w", filepath.Join(w.dir, w.name), d, errdefs.ErrNotFound)
	}
	return r, nil
}

// Info returns the size of a blob that was written, or [errdefs.ErrNotFound].
func (w *Output) Info(_ context.Context, d digest.Digest) (content.Info, error) {
	r, err := w.blob(d)
	return content.Info{Digest: d, Size: r.size}, err
}

// ReaderAt returns a reader of a blob that was written, as [Layout.ReaderAt] does.
func (w *Output) ReaderAt(_ context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	r, err := w.blob(desc.Digest)
	if err != nil {
		return nil, err
	}
	files := files{archive: w.file.File}
	return verified.New(files.section(r), desc)
}

// Finish makes name, if it is not empty, stand for desc, whose blobs are there, and
// gives the archive its own name. It replaces a file of that name.
func (w *Output) Finish(desc ocispec.Descriptor, name string) error {
	if w.pending > 0 {
		return fmt.Errorf("%d blobs are not whole: %w", w.pending, errdefs.ErrFailedPrecondition)
	}
	index, err := layout.WithImage(nil, desc, name)
	if err != nil {
		return err
	}
	if err := w.add(ocispec.ImageIndexFile, index); err != nil {
		return err
	}
	// Two blocks of zeros end an archive, and a hole is zeros.
	if err := w.file.Truncate(w.end + 2*blockSize); err != nil {
		return err
	}
	f := w.file
	w.file, w.closed = nil, true
	return errors.Join(f.Commit(w.name), w.root.Close())
}

// Close removes an archive that was not finished.
func (w *Output) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return nil
	}
	w.closed = true
	var err error
	if w.file != nil {
		err = w.file.Discard()
	}
	return errors.Join(err, w.root.Close())
}

// Package layout lets package image work on images in a directory with the OCI image
// layout: https://github.com/opencontainers/image-spec/blob/v1.1.1/image-layout.md.
package layout

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/partfile"
	"github.com/ctrlplane/pilot/internal/verified"
)

const (
	// maxIndex bounds index.json, in bytes.
	maxIndex = 8 << 20
	// verifySize is how many bytes of a blob are read at once to compare its digest.
	verifySize = 1 << 20
	// blobsDir is the directory of blobs with the digests that are written.
	blobsDir = ocispec.ImageBlobsDir + "/sha256"
)

// Layout is a directory of images.
type Layout struct {
	name string

	mu      sync.Mutex
	root    *os.Root  // nil until it was opened
	cleaned sync.Once // of what killed processes left
}

// Open opens a layout. The error wraps [fs.ErrNotExist] if the directory is not there.
// The caller closes it.
func Open(dir string) (*Layout, error) {
	l := New(dir)
	_, err := l.open(false)
	if at := (*fs.PathError)(nil); errors.Is(err, fs.ErrNotExist) && errors.As(err, &at) {
		err = at // a directory that is not there is another error than an image that is not
	}
	return l, err
}

// New returns a layout that need not be there, or may be an empty directory. It is made
// when the first blob is written. The caller closes it.
func New(dir string) *Layout { return &Layout{name: dir} }

// open returns the directory. If it is not there or empty, it is made a layout if that is
// wanted, and otherwise the error wraps [errdefs.ErrNotFound].
func (l *Layout) open(create bool) (*os.Root, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.root != nil {
		return l.root, nil
	}
	if create {
		if err := os.MkdirAll(l.name, 0o777); err != nil {
			return nil, err
		}
	}
	root, err := os.OpenRoot(l.name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	if create {
		err = prepare(root)
	} else {
		err = check(root)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", l.name, err), root.Close())
	}
	l.root = root
	return root, nil
}

// writable returns the directory to write to.
func (l *Layout) writable() (*os.Root, error) {
	root, err := l.open(true)
	if err != nil {
		return nil, err
	}
	l.cleaned.Do(func() {
		partfile.Clean(root, ".")
		partfile.Clean(root, ocispec.ImageBlobsDir)
	})
	return root, root.MkdirAll(blobsDir, 0o777)
}

// prepare makes a directory a layout, if it is empty. Others may be making the same one.
func prepare(root *os.Root) error {
	if err := check(root); !errdefs.IsNotFound(err) {
		return err
	}
	// The file that makes it a layout comes first, so that a run that is killed here does
	// not leave a directory that the next one refuses.
	if err := add(root, ocispec.ImageLayoutFile, ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}); err != nil {
		return err
	}
	return add(root, ocispec.ImageIndexFile, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{},
	})
}

// check reports whether the directory is a layout of a version that is known. The error
// wraps [errdefs.ErrNotFound] if it is empty.
func check(root *os.Root) error {
	// Before the file is looked for, since another process may be making it.
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return err
	}
	b, err := read(root, ocispec.ImageLayoutFile)
	switch {
	case err == nil:
		return CheckVersion(b)
	case !errors.Is(err, fs.ErrNotExist):
		return err
	case slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return !partfile.Is(e.Name()) }):
		return errors.New("the directory is no OCI image layout: it has no file oci-layout")
	}
	return fmt.Errorf("the directory is empty: %w", errdefs.ErrNotFound)
}

// CheckVersion checks the content of a file oci-layout.
func CheckVersion(b []byte) error {
	var version ocispec.ImageLayout
	if err := json.Unmarshal(b, &version); err != nil {
		return fmt.Errorf("oci-layout: %w", err)
	}
	if major, _, _ := strings.Cut(version.Version, "."); major != "1" {
		return fmt.Errorf("oci-layout: version %q is not known, only 1", version.Version)
	}
	return nil
}

// Close closes the layout.
func (l *Layout) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.root == nil {
		return nil
	}
	return l.root.Close()
}

// Same reports whether both are the same directory.
func (l *Layout) Same(other *Layout) bool {
	a, err := os.Stat(l.name)
	if err != nil {
		return false
	}
	b, err := os.Stat(other.name)
	return err == nil && os.SameFile(a, b)
}

// read reads a small file.
func read(root *os.Root, name string) ([]byte, error) {
	f, _, err := openFile(root, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxIndex+1))
	if err == nil && len(b) > maxIndex {
		err = fmt.Errorf("%s has more than %d bytes", name, maxIndex)
	}
	return b, err
}

// openFile opens a regular file: nothing else has an end.
func openFile(root *os.Root, name string) (*os.File, int64, error) {
	info, err := root.Stat(name)
	if err != nil {
		return nil, 0, err
	}
	if !info.Mode().IsRegular() {
		return nil, 0, fmt.Errorf("%s is no file", path.Join(root.Name(), name))
	}
	f, err := root.Open(name)
	if err != nil {
		return nil, 0, err
	}
	return f, info.Size(), nil
}

// add writes a small file as a whole, unless there is one of that name.
func add(root *os.Root, name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	f, err := writePart(root, b)
	if err != nil {
		return err
	}
	return f.CommitNew(name)
}

// replace writes a small file as a whole.
func replace(root *os.Root, name string, b []byte) error {
	f, err := writePart(root, b)
	if err != nil {
		return err
	}
	return f.Commit(name)
}

func writePart(root *os.Root, b []byte) (*partfile.File, error) {
	f, err := partfile.Create(root, ".", 0o666)
	if err != nil {
		return nil, err
	}
	if _, err := f.Write(b); err != nil {
		return nil, errors.Join(err, f.Discard())
	}
	return f, nil
}

// index returns the content of index.json, or nil if there is none.
func (l *Layout) index() ([]byte, error) {
	root, err := l.open(false)
	if err != nil {
		return nil, err
	}
	b, err := read(root, ocispec.ImageIndexFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", l.name, err)
	}
	return b, err
}

// Resolve returns the image of that name, which is the value of an annotation in
// index.json, or the only one if the name is empty. The error wraps
// [errdefs.ErrNotFound] if there is none.
func (l *Layout) Resolve(_ context.Context, name string) (ocispec.Descriptor, error) {
	b, err := l.index()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if b == nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s has no index.json: %w", l.name, errdefs.ErrNotFound)
	}
	desc, err := Find(b, name)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s: %w", l.name, err)
	}
	return desc, nil
}

// Names returns the names of the images, or none if there is no layout yet.
func (l *Layout) Names(context.Context) ([]string, error) {
	b, err := l.index()
	if errdefs.IsNotFound(err) || err == nil && b == nil {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return Names(b)
}

// Tag makes name stand for desc, whose blobs are there. What the name stood for
// before stays in the directory. An empty name adds an image without one. The rest of
// index.json stays as it is.
//
// Unless before is nil, the error wraps [errdefs.ErrConflict] if the name stands for
// something else than before, or, if that is empty, for anything. An empty name is that of
// the only image then, if before is not empty.
func (l *Layout) Tag(ctx context.Context, desc ocispec.Descriptor, name string, before *digest.Digest) error {
	root, err := l.writable()
	if err != nil {
		return err
	}
	unlock, err := lock(ctx, root)
	if err != nil {
		return fmt.Errorf("lock %s: %w", l.name, err)
	}
	defer unlock()
	had, err := l.index()
	if err != nil {
		return err
	}
	if before != nil && (name != "" || *before != "") {
		now := ocispec.Descriptor{}
		if had != nil {
			now, err = Find(had, name)
		}
		if err != nil && !errdefs.IsNotFound(err) || now.Digest != *before {
			return fmt.Errorf("%s: %w", l.name, errdefs.ErrConflict)
		}
	}
	var replaces digest.Digest
	if before != nil {
		replaces = *before
	}
	after, err := withImage(had, desc, name, replaces)
	if err != nil {
		return fmt.Errorf("%s: %w", l.name, err)
	}
	return replace(root, ocispec.ImageIndexFile, after)
}

// BlobPath returns the name of a blob's file in a layout, with slashes.
func BlobPath(d digest.Digest) (string, error) {
	if err := d.Validate(); err != nil {
		return "", fmt.Errorf("digest %q: %w", d, err)
	}
	return path.Join(ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded()), nil
}

// Info returns the size of a blob, or [errdefs.ErrNotFound].
func (l *Layout) Info(_ context.Context, d digest.Digest) (content.Info, error) {
	name, err := BlobPath(d)
	if err != nil {
		return content.Info{}, err
	}
	root, err := l.open(false)
	if err != nil {
		return content.Info{}, err
	}
	info, err := root.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return content.Info{}, l.absent(d)
	}
	if err != nil {
		return content.Info{}, err
	}
	return content.Info{Digest: d, Size: info.Size(), UpdatedAt: info.ModTime()}, nil
}

func (l *Layout) absent(d digest.Digest) error {
	return fmt.Errorf("%s has no blob %s: %w", l.name, d, errdefs.ErrNotFound)
}

// ReaderAt returns a reader of a blob, which has to be read in order, and is checked
// against its digest before its last byte is given out.
func (l *Layout) ReaderAt(_ context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	b, err := l.blob(desc)
	if err != nil {
		return nil, err
	}
	return verified.New(b, desc)
}

// ReadRange reads len(p) bytes of a blob, at that offset. Nobody has checked them.
func (l *Layout) ReadRange(_ context.Context, desc ocispec.Descriptor, p []byte, off int64) error {
	b, err := l.blob(desc)
	if err != nil {
		return err
	}
	defer b.Close()
	_, err = io.ReadFull(io.NewSectionReader(b, off, int64(len(p))), p)
	return err
}

func (l *Layout) blob(desc ocispec.Descriptor) (blob, error) {
	name, err := BlobPath(desc.Digest)
	if err != nil {
		return blob{}, err
	}
	root, err := l.open(false)
	if err != nil {
		return blob{}, err
	}
	f, size, err := openFile(root, name)
	if errors.Is(err, fs.ErrNotExist) {
		return blob{}, l.absent(desc.Digest)
	}
	return blob{f, size}, err
}

type blob struct {
	*os.File
	size int64
}

func (b blob) Size() int64 { return b.size }

// Verify reads a blob and compares it with its descriptor. The error wraps
// [verified.ErrDigest] if it is something else, or [errdefs.ErrNotFound].
func (l *Layout) Verify(ctx context.Context, desc ocispec.Descriptor) error {
	ra, err := l.ReaderAt(ctx, desc)
	if err != nil {
		return err
	}
	defer ra.Close()
	if ra.Size() != desc.Size {
		return fmt.Errorf("%w: %s has %d bytes, and not %d", verified.ErrDigest, desc.Digest, ra.Size(), desc.Size)
	}
	buf := make([]byte, verifySize)
	for off := int64(0); off < desc.Size; {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		n, err := ra.ReadAt(buf, off)
		off += int64(n)
		if err != nil && !(errors.Is(err, io.EOF) && off == desc.Size) {
			return err
		}
	}
	return nil
}

// Abort does nothing: closing a writer removes what it wrote.
func (l *Layout) Abort(context.Context, string) error { return nil }

// Update does nothing: a layout keeps no labels.
func (l *Layout) Update(_ context.Context, info content.Info, _ ...string) (content.Info, error) {
	return info, nil
}

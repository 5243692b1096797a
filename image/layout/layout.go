// Package layout lets package image work on images in a directory with the OCI image
// layout: https://github.com/opencontainers/image-spec/blob/v1.1.1/image-layout.md.
package layout

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/replacefile"
	"github.com/ctrlplane/pilot/internal/verified"
)

// maxIndex bounds index.json, in bytes.
const maxIndex = 8 << 20

// Layout is a directory of images.
type Layout struct {
	name string
	root *os.Root
}

// Open opens a layout. The error wraps [fs.ErrNotExist] if the directory is not there.
// The caller closes it.
func Open(dir string) (*Layout, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	l := &Layout{dir, root}
	if err := l.check(); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", dir, err), root.Close())
	}
	return l, nil
}

// Create opens a layout, and makes it first if it is not there or an empty directory.
func Create(dir string) (*Layout, error) {
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	l := &Layout{dir, root}
	if err := l.create(); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", dir, err), root.Close())
	}
	return l, nil
}

// create makes what a layout lacks. Others may be making the same one.
func (l *Layout) create() error {
	err := l.check()
	if errdefs.IsNotFound(err) {
		err = l.add(ocispec.ImageLayoutFile, ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	}
	if err != nil {
		return err
	}
	err = l.add(ocispec.ImageIndexFile, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{},
	})
	if err != nil {
		return err
	}
	return l.root.MkdirAll("blobs/sha256", 0o777)
}

// check returns an error if the directory is no layout, or one of a version that is not
// known. The error wraps [errdefs.ErrNotFound] if one can be made there.
func (l *Layout) check() error {
	entries, err := fs.ReadDir(l.root.FS(), ".")
	if err != nil {
		return err
	}
	b, err := l.read(ocispec.ImageLayoutFile)
	switch {
	case err == nil:
		return CheckVersion(b)
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	const none = "the directory is no OCI image layout: it has no file oci-layout"
	if slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return !strings.HasPrefix(e.Name(), temporaryOf(ocispec.ImageLayoutFile)) }) {
		return errors.New(none)
	}
	return fmt.Errorf("%s: %w", none, errdefs.ErrNotFound)
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
func (l *Layout) Close() error { return l.root.Close() }

// read reads a small file.
func (l *Layout) read(name string) ([]byte, error) {
	f, _, err := l.open(name)
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

// open opens a regular file: nothing else has an end.
func (l *Layout) open(name string) (*os.File, int64, error) {
	info, err := l.root.Stat(name)
	if err != nil {
		return nil, 0, err
	}
	if !info.Mode().IsRegular() {
		return nil, 0, fmt.Errorf("%s is no file", path.Join(l.name, name))
	}
	f, err := l.root.Open(name)
	if err != nil {
		return nil, 0, err
	}
	return f, info.Size(), nil
}

// temporaryOf returns what the name of a file begins with until it is whole.
func temporaryOf(name string) string { return "." + name + "." }

// add writes a small file as a whole, unless there is one of that name.
func (l *Layout) add(name string, v any) error {
	if _, err := l.root.Lstat(name); err == nil {
		return nil
	}
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return l.write(name, b, func(temporary string) error {
		err := l.root.Link(temporary, name)
		if errors.Is(err, fs.ErrExist) {
			err = nil
		} else if err != nil { // a file system without links
			return l.root.Rename(temporary, name)
		}
		return errors.Join(err, l.root.Remove(temporary))
	})
}

// replace writes a small file as a whole.
func (l *Layout) replace(name string, b []byte) error {
	return l.write(name, b, func(temporary string) error {
		return replacefile.Rename(func() error { return l.root.Rename(temporary, name) })
	})
}

// write writes a file, to which use gives its name.
func (l *Layout) write(name string, b []byte, use func(temporary string) error) error {
	temporary := temporaryOf(name) + rand.Text()
	f, err := l.root.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = use(temporary)
	}
	if err != nil {
		err = errors.Join(err, l.root.Remove(temporary))
	}
	return err
}

// Resolve returns the image of that name, which is the value of an annotation in
// index.json, or the only one if the name is empty. The error wraps
// [errdefs.ErrNotFound] if there is none.
func (l *Layout) Resolve(_ context.Context, name string) (ocispec.Descriptor, error) {
	b, err := l.read(ocispec.ImageIndexFile)
	if errors.Is(err, fs.ErrNotExist) {
		return ocispec.Descriptor{}, fmt.Errorf("%s has no index.json: %w", l.name, errdefs.ErrNotFound)
	}
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s: %w", l.name, err)
	}
	desc, err := Find(b, name)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s: %w", l.name, err)
	}
	return desc, nil
}

// Find returns the image of that name in the content of an index.json.
func Find(index []byte, name string) (ocispec.Descriptor, error) {
	var list ocispec.Index
	if err := json.Unmarshal(index, &list); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("index.json: %w", err)
	}
	if name == "" {
		switch len(list.Manifests) {
		case 0:
			return ocispec.Descriptor{}, fmt.Errorf("it has no images: %w", errdefs.ErrNotFound)
		case 1:
			return bare(list.Manifests[0]), nil
		}
		return ocispec.Descriptor{}, fmt.Errorf("it has %d images: name one of %s", len(list.Manifests), strings.Join(names(list), ", "))
	}
	var found []ocispec.Descriptor
	for _, d := range list.Manifests {
		if d.Annotations[ocispec.AnnotationRefName] == name || d.Annotations[images.AnnotationImageName] == name {
			if !slices.ContainsFunc(found, func(f ocispec.Descriptor) bool { return f.Digest == d.Digest }) {
				found = append(found, d)
			}
		}
	}
	switch len(found) {
	case 0:
		if all := names(list); len(all) > 0 {
			return ocispec.Descriptor{}, fmt.Errorf("it has no image %q, only %s: %w", name, strings.Join(all, ", "), errdefs.ErrNotFound)
		}
		return ocispec.Descriptor{}, fmt.Errorf("it has no image %q: %w", name, errdefs.ErrNotFound)
	case 1:
		return bare(found[0]), nil
	}
	return ocispec.Descriptor{}, fmt.Errorf("it has %d images %q", len(found), name)
}

// bare returns a descriptor without what the index says of the name.
func bare(d ocispec.Descriptor) ocispec.Descriptor {
	d.Annotations = nil
	return d
}

// maxNames is how many names an error shows.
const maxNames = 10

func names(index ocispec.Index) []string {
	var all []string
	for _, d := range index.Manifests {
		if name := d.Annotations[ocispec.AnnotationRefName]; name != "" {
			if all = append(all, name); len(all) == maxNames {
				return append(all, "…")
			}
		}
	}
	return all
}

// Tag makes name stand for desc, whose blobs are there. What the name stood for
// before stays in the directory. An empty name adds an image without one. The rest of
// index.json stays as it is.
func (l *Layout) Tag(ctx context.Context, desc ocispec.Descriptor, name string) error {
	unlock, err := l.lock(ctx)
	if err != nil {
		return fmt.Errorf("lock %s: %w", l.name, err)
	}
	defer unlock()
	before, err := l.read(ocispec.ImageIndexFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	after, err := WithImage(before, desc, name)
	if err != nil {
		return fmt.Errorf("%s: %w", l.name, err)
	}
	return l.replace(ocispec.ImageIndexFile, after)
}

// WithImage returns the content of an index.json in which name stands for desc.
func WithImage(index []byte, desc ocispec.Descriptor, name string) ([]byte, error) {
	doc := map[string]json.RawMessage{"schemaVersion": json.RawMessage("2"), "mediaType": json.RawMessage(`"` + ocispec.MediaTypeImageIndex + `"`)}
	if len(index) > 0 {
		doc = nil
		if err := json.Unmarshal(index, &doc); err != nil {
			return nil, fmt.Errorf("index.json: %w", err)
		}
	}
	var entries []json.RawMessage
	if raw := doc["manifests"]; len(raw) > 0 {
		if err := json.Unmarshal(raw, &entries); err != nil {
			return nil, fmt.Errorf("index.json: manifests: %w", err)
		}
	}
	desc.Annotations = nil
	if name != "" {
		desc.Annotations = map[string]string{ocispec.AnnotationRefName: name}
	}
	kept := make([]json.RawMessage, 0, len(entries)+1)
	for _, e := range entries {
		var d ocispec.Descriptor
		if err := json.Unmarshal(e, &d); err != nil {
			return nil, fmt.Errorf("index.json: %w", err)
		}
		had, named := d.Annotations[ocispec.AnnotationRefName]
		if named && had == name || !named && name == "" && d.Digest == desc.Digest {
			continue
		}
		kept = append(kept, e)
	}
	entry, err := json.Marshal(desc)
	if err != nil {
		return nil, err
	}
	if doc["manifests"], err = json.Marshal(append(kept, entry)); err != nil {
		return nil, err
	}
	return json.Marshal(doc)
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
	info, err := l.root.Stat(name)
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
	name, err := BlobPath(desc.Digest)
	if err != nil {
		return nil, err
	}
	f, size, err := l.open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, l.absent(desc.Digest)
	}
	if err != nil {
		return nil, err
	}
	return verified.New(blob{f, size}, desc)
}

type blob struct {
	*os.File
	size int64
}

func (b blob) Size() int64 { return b.size }

// Abort does nothing: closing a writer removes what it wrote.
func (l *Layout) Abort(context.Context, string) error { return nil }

// Update does nothing: a layout keeps no labels.
func (l *Layout) Update(_ context.Context, info content.Info, _ ...string) (content.Info, error) {
	return info, nil
}

// Writer returns a writer of a new blob.
func (l *Layout) Writer(_ context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	var o content.WriterOpts
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return nil, err
		}
	}
	temporary := path.Join(ocispec.ImageBlobsDir, ".pilot-"+rand.Text())
	f, err := l.root.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return nil, err
	}
	return &writer{layout: l, ref: o.Ref, file: f, temporary: temporary, started: time.Now(), digester: digest.Canonical.Digester()}, nil
}

type writer struct {
	layout    *Layout
	ref       string
	file      *os.File // nil when it is closed
	temporary string
	started   time.Time
	digester  digest.Digester
	n         int64
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
	err = errors.Join(w.file.Sync(), w.file.Close())
	w.file = nil
	if err == nil {
		err = replacefile.Rename(func() error { return w.layout.root.Rename(w.temporary, name) })
	}
	if err != nil {
		return errors.Join(err, w.layout.root.Remove(w.temporary))
	}
	return nil
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
	err := errors.Join(w.file.Close(), w.layout.root.Remove(w.temporary))
	w.file = nil
	return err
}

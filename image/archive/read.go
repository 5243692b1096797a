// Package archive lets package image work on images in tar archives: OCI image layouts
// in one, and what "docker save" writes. Nothing is unpacked.
package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/image/layout"
	"github.com/ctrlplane/pilot/internal/verified"
)

const (
	// maxFiles is how many files an archive may have.
	maxFiles = 1 << 16
	// maxDocument bounds a JSON document in an archive, in bytes.
	maxDocument = 8 << 20
	// maxLinks is how many links a file's name may lead through.
	maxLinks = 8
)

// region is where the content of a file is in an archive.
type region struct{ offset, size int64 }

// files are the files of an archive by their names.
type files struct {
	name    string
	archive *os.File
	regions map[string]region
	links   map[string]string
}

func openFiles(name string) (_ *files, err error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no file: an archive is read in several places, which a pipe does not have", name)
	}
	f, err := open(name)
	if err != nil {
		return nil, err
	}
	a := &files{name, f, map[string]region{}, map[string]string{}}
	if err := a.index(info.Size()); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", name, err), f.Close())
	}
	return a, nil
}

// index finds the files, of which it reads the headers alone.
func (a *files) index(size int64) error {
	magic := make([]byte, 10)
	n, err := a.archive.ReadAt(magic, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if compression.DetectCompression(magic[:n]) != compression.Uncompressed {
		return errors.New("the archive is compressed: decompress it first, as with gunzip or zstd -d")
	}
	r := tar.NewReader(a.archive)
	for count := 0; ; count++ {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("it is no tar archive, or is damaged: %w", err)
		}
		if count == maxFiles {
			return fmt.Errorf("it has more than %d files", maxFiles)
		}
		name := path.Clean("/" + h.Name)[1:]
		switch h.Typeflag {
		case tar.TypeReg:
			offset, err := a.archive.Seek(0, io.SeekCurrent)
			if err != nil {
				return err
			}
			if h.Size > size-offset {
				return fmt.Errorf("it is cut off: %s has %d bytes, of which %d are there", name, h.Size, size-offset)
			}
			a.regions[name] = region{offset, h.Size}
		case tar.TypeSymlink:
			a.links[name] = path.Join("/", path.Dir(name), h.Linkname)[1:]
		case tar.TypeLink:
			a.links[name] = path.Clean("/" + h.Linkname)[1:]
		}
	}
}

func (a *files) find(name string) (region, bool) {
	name = path.Clean("/" + name)[1:]
	for range maxLinks {
		if r, ok := a.regions[name]; ok {
			return r, true
		}
		to, ok := a.links[name]
		if !ok {
			break
		}
		name = to
	}
	return region{}, false
}

// read reads a small file.
func (a *files) read(name string) ([]byte, error) {
	r, ok := a.find(name)
	if !ok {
		return nil, fmt.Errorf("%s has no file %s: %w", a.name, name, errdefs.ErrNotFound)
	}
	if r.size > maxDocument {
		return nil, fmt.Errorf("%s: %s has %d bytes, more than %d", a.name, name, r.size, maxDocument)
	}
	b := make([]byte, r.size)
	_, err := a.archive.ReadAt(b, r.offset)
	return b, err
}

// section is a [content.ReaderAt] of a part of a file that is open elsewhere.
type section struct{ *io.SectionReader }

func (section) Close() error { return nil }

func (a *files) section(r region) section {
	return section{io.NewSectionReader(a.archive, r.offset, r.size)}
}

// Layout is an OCI image layout in an archive, to be read.
type Layout struct{ *files }

// Open opens an archive of an OCI image layout. The caller closes it.
func Open(name string) (*Layout, error) {
	a, err := openFiles(name)
	if err != nil {
		return nil, err
	}
	version, err := a.read(ocispec.ImageLayoutFile)
	switch {
	case errdefs.IsNotFound(err):
		err = fmt.Errorf("%s is no OCI archive: it has no file oci-layout", name)
		if _, ok := a.find(manifestFile); ok {
			err = fmt.Errorf("%w, but one of \"docker save\": use docker-archive:%s", err, name)
		}
	case err == nil:
		if err = layout.CheckVersion(version); err != nil {
			err = fmt.Errorf("%s: %w", name, err)
		}
	}
	if err != nil {
		return nil, errors.Join(err, a.Close())
	}
	return &Layout{a}, nil
}

// Close closes the archive.
func (a *files) Close() error { return a.archive.Close() }

// Resolve returns the image of that name, or the only one if the name is empty, as
// [layout.Layout.Resolve] does.
func (l *Layout) Resolve(_ context.Context, name string) (ocispec.Descriptor, error) {
	index, err := l.read(ocispec.ImageIndexFile)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc, err := layout.Find(index, name)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s: %w", l.name, err)
	}
	return desc, nil
}

// Referrers lists what is about a manifest, as [layout.Referrers] does.
func (l *Layout) Referrers(ctx context.Context) ([]layout.Referrer, error) {
	index, err := l.read(ocispec.ImageIndexFile)
	if err != nil {
		return nil, err
	}
	return layout.Referrers(ctx, index, l)
}

func (l *Layout) blob(d digest.Digest) (region, error) {
	name, err := layout.BlobPath(d)
	if err != nil {
		return region{}, err
	}
	r, ok := l.find(name)
	if !ok {
		return region{}, fmt.Errorf("%s has no blob %s: %w", l.name, d, errdefs.ErrNotFound)
	}
	return r, nil
}

// Info returns the size of a blob, or [errdefs.ErrNotFound].
func (l *Layout) Info(_ context.Context, d digest.Digest) (content.Info, error) {
	r, err := l.blob(d)
	return content.Info{Digest: d, Size: r.size}, err
}

// ReaderAt returns a reader of a blob, which has to be read in order, and is checked
// against its digest before its last byte is given out.
func (l *Layout) ReaderAt(_ context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	r, err := l.blob(desc.Digest)
	if err != nil {
		return nil, err
	}
	return verified.New(l.section(r), desc)
}

// ReadRange reads len(p) bytes of a blob, at that offset. Nobody has checked them.
func (l *Layout) ReadRange(_ context.Context, desc ocispec.Descriptor, p []byte, off int64) error {
	r, err := l.blob(desc.Digest)
	if err != nil {
		return err
	}
	_, err = io.ReadFull(io.NewSectionReader(l.section(r), off, int64(len(p))), p)
	return err
}

// isTar reports whether the beginning of a layer is that of a tar archive which is not
// compressed.
func isTar(magic []byte) bool {
	return compression.DetectCompression(magic) == compression.Uncompressed
}

// hasTag reports whether one of the tags of an image is meant by a name, which may
// leave out the registry and "latest" as Docker's command line does.
func hasTag(tags []string, name string) bool {
	for _, tag := range tags {
		if tag == name || tag == name+":latest" || strings.TrimPrefix(tag, "docker.io/library/") == name {
			return true
		}
	}
	return false
}

// inMemory is a [content.ReaderAt] of a document that was made.
type inMemory struct{ *bytes.Reader }

func (inMemory) Close() error { return nil }

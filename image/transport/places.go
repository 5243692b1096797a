package transport

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/image/archive"
	"github.com/ctrlplane/pilot/image/layout"
	"github.com/ctrlplane/pilot/image/registry"
	"github.com/ctrlplane/pilot/internal/verified"
)

type readable interface {
	content.Provider
	content.InfoProvider
	Close() error
}

// archived is an image in an archive that is read.
type archived struct {
	readable
	resolve func(context.Context, string) (ocispec.Descriptor, error)
	name    string
}

func (a *archived) Resolve(ctx context.Context) (ocispec.Descriptor, error) {
	return a.resolve(ctx, a.name)
}

// ReadRange reads a part of a blob of an OCI archive.
func (a *archived) ReadRange(ctx context.Context, desc ocispec.Descriptor, p []byte, off int64) error {
	r, ok := a.readable.(ranged)
	if !ok {
		return fmt.Errorf("blob %s: %w", desc.Digest, errors.ErrUnsupported)
	}
	return r.ReadRange(ctx, desc, p, off)
}

type registryImage struct{ *registry.Repository }

func (registryImage) Close() error { return nil }

func (r registryImage) Holds(source Source) bool {
	other, ok := source.(registryImage)
	return ok && r.Repository.Holds(other.Repository)
}

func (r registryImage) Copy(ctx context.Context, from content.Provider, desc ocispec.Descriptor) (registry.Origin, error) {
	if other, ok := from.(registryImage); ok {
		from = other.Repository
	}
	return r.Repository.Copy(ctx, from, desc)
}

func (r registryImage) Document(ctx context.Context, from content.Provider, desc ocispec.Descriptor) error {
	return r.Push(ctx, from, desc, desc.Digest.String())
}

// Name looks at the tag once more before it moves it. No registry can do both at once.
func (r registryImage) Name(ctx context.Context, from content.Provider, desc ocispec.Descriptor, before *digest.Digest) error {
	if before != nil {
		now, err := r.Resolve(ctx)
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		if now.Digest != *before {
			return errdefs.ErrConflict
		}
	}
	return r.Push(ctx, from, desc, r.Tag())
}

// layoutImage is an image in a layout.
type layoutImage struct {
	*layout.Layout
	name string
	// added says that an image without a name is added to those that are there.
	added bool
}

func (l *layoutImage) Resolve(ctx context.Context) (ocispec.Descriptor, error) {
	if l.added {
		if _, err := l.Names(ctx); err != nil {
			return ocispec.Descriptor{}, err
		}
		return ocispec.Descriptor{}, errdefs.ErrNotFound
	}
	return l.Layout.Resolve(ctx, l.name)
}

func (l *layoutImage) Holds(source Source) bool {
	other, ok := source.(*layoutImage)
	return ok && l.Same(other.Layout)
}

// Copy copies a blob that the layout lacks. One that it has is read, since nobody else
// checks what is in a directory, and replaced if it is damaged.
func (l *layoutImage) Copy(ctx context.Context, from content.Provider, desc ocispec.Descriptor) (registry.Origin, error) {
	switch err := l.Verify(ctx, desc); {
	case err == nil:
		return registry.Present, nil
	case errdefs.IsNotFound(err), errors.Is(err, verified.ErrDigest):
		return registry.Copied, copyBlob(ctx, l, from, desc)
	default:
		return "", err
	}
}

func (l *layoutImage) Document(ctx context.Context, from content.Provider, desc ocispec.Descriptor) error {
	_, err := l.Copy(ctx, from, desc)
	return err
}

func (l *layoutImage) Name(ctx context.Context, from content.Provider, desc ocispec.Descriptor, before *digest.Digest) error {
	if err := l.Document(ctx, from, desc); err != nil {
		return err
	}
	return l.Tag(ctx, desc, l.name, before)
}

// newArchive is an archive that is being written. It replaces the file of its name,
// with all images in that.
type newArchive struct {
	*archive.Output
	to Name
}

// Resolve returns the only image in the file that is replaced, if it has the name. If
// anything else is in the file, the error wraps [errdefs.ErrAlreadyExists].
func (a *newArchive) Resolve(ctx context.Context) (ocispec.Descriptor, error) {
	if _, err := os.Stat(a.to.Path); errors.Is(err, fs.ErrNotExist) {
		return ocispec.Descriptor{}, errdefs.ErrNotFound
	} else if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc, err := a.only(ctx)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s holds something else than the image (%v): %w", a.to.Path, err, errdefs.ErrAlreadyExists)
	}
	return desc, nil
}

func (a *newArchive) only(ctx context.Context) (ocispec.Descriptor, error) {
	before, err := archive.Open(a.to.Path)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer before.Close()
	only, err := before.Resolve(ctx, "")
	if err != nil || a.to.Image == "" {
		return only, err
	}
	return before.Resolve(ctx, a.to.Image)
}

func (a *newArchive) Holds(Source) bool { return false }

func (a *newArchive) Copy(ctx context.Context, from content.Provider, desc ocispec.Descriptor) (registry.Origin, error) {
	return CopyBlob(ctx, a, from, desc)
}

func (a *newArchive) Document(ctx context.Context, from content.Provider, desc ocispec.Descriptor) error {
	_, err := CopyBlob(ctx, a, from, desc)
	return err
}

func (a *newArchive) Name(ctx context.Context, from content.Provider, desc ocispec.Descriptor, before *digest.Digest) error {
	if err := a.Document(ctx, from, desc); err != nil {
		return err
	}
	if before != nil {
		now, err := a.Resolve(ctx)
		if now.Digest != *before || err != nil && !errdefs.IsNotFound(err) {
			return errdefs.ErrConflict
		}
	}
	return a.Finish(desc, a.to.Image)
}

// blobs is a store that checks what is written to it.
type blobs interface {
	content.InfoProvider
	content.Ingester
}

// CopyBlob copies a blob to a store that lacks it.
func CopyBlob(ctx context.Context, to blobs, from content.Provider, desc ocispec.Descriptor) (registry.Origin, error) {
	if info, err := to.Info(ctx, desc.Digest); err == nil && info.Size == desc.Size {
		return registry.Present, nil
	} else if err != nil && !errdefs.IsNotFound(err) {
		return "", err
	}
	return registry.Copied, copyBlob(ctx, to, from, desc)
}

func copyBlob(ctx context.Context, to content.Ingester, from content.Provider, desc ocispec.Descriptor) error {
	ra, err := from.ReaderAt(ctx, desc)
	if err != nil {
		return err
	}
	defer ra.Close()
	if ra.Size() != desc.Size {
		return fmt.Errorf("blob %s has %d bytes, and its descriptor says %d", desc.Digest, ra.Size(), desc.Size)
	}
	w, err := content.OpenWriter(ctx, to, content.WithRef("copy-"+desc.Digest.Encoded()), content.WithDescriptor(ocispec.Descriptor{Size: desc.Size}))
	if err != nil {
		return err
	}
	defer w.Close()
	status, err := w.Status()
	if err != nil {
		return err
	}
	if err := copyAll(ctx, w, ra, status.Offset); err != nil {
		return fmt.Errorf("copy %s: %w", desc.Digest, err)
	}
	err = w.Commit(ctx, desc.Size, desc.Digest)
	if errdefs.IsAlreadyExists(err) {
		return nil // another process was faster
	}
	return err
}

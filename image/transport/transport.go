// Package transport finds images by names as skopeo spells them, and brings to one
// place what package image made of an image in another:
//
//	docker://REGISTRY/REPOSITORY:TAG   a registry
//	oci:DIRECTORY[:NAME]               a directory with the OCI image layout
//	oci-archive:FILE[:NAME]            the same in a tar archive
//	docker-archive:FILE[:NAME]         what "docker save" writes, to be read only
//
// On Windows a path may begin with a drive, as in oci:C:\images\app:1.
package transport

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/image/archive"
	"github.com/ctrlplane/pilot/image/layout"
	"github.com/ctrlplane/pilot/image/registry"
)

// The transports.
const (
	Registry      = "docker"
	OCI           = "oci"
	OCIArchive    = "oci-archive"
	DockerArchive = "docker-archive"
	Containerd    = "containerd"
)

// Name is the name of an image somewhere.
type Name struct {
	Transport string
	Path      string // of a file or directory
	Image     string // in there, or in the registry, or in containerd
}

// ErrName is wrapped by the error of a name that can't be read.
var ErrName = errors.New("bad image name")

// Parse reads a name. One without a transport is that of an image in containerd.
func Parse(s string) (Name, error) { return parse(s, runtime.GOOS == "windows") }

func parse(s string, windows bool) (Name, error) {
	transport, rest, _ := strings.Cut(s, ":")
	n := Name{Transport: transport}
	switch transport {
	case Registry:
		ref, ok := strings.CutPrefix(rest, "//")
		if !ok {
			return Name{}, fmt.Errorf("%w: %q: a registry's is docker://REGISTRY/REPOSITORY:TAG", ErrName, s)
		}
		spec, err := reference.Parse(ref)
		if err != nil || spec.Object == "" || !strings.Contains(spec.Locator, "/") {
			return Name{}, fmt.Errorf("%w: %q: it takes a registry, a repository and a tag, as in docker://registry.example.com/app:1", ErrName, s)
		}
		n.Image = ref
	case OCI, OCIArchive, DockerArchive:
		n.Path, n.Image = splitPath(rest, windows)
		if n.Path == "" {
			return Name{}, fmt.Errorf("%w: %q: it has no path", ErrName, s)
		}
	case Containerd:
		n.Image = rest
	default:
		if windows && hasDrive(s) {
			return Name{}, fmt.Errorf("%w: %q: a path follows its transport, as in oci:%[2]s or oci-archive:%[2]s", ErrName, s)
		}
		n = Name{Transport: Containerd, Image: s}
	}
	if n.Transport == Containerd && n.Image == "" {
		return Name{}, fmt.Errorf("%w: %q: it names no image", ErrName, s)
	}
	return n, nil
}

// splitPath splits PATH:IMAGE at the first colon that is not that of a drive.
func splitPath(s string, windows bool) (file, image string) {
	n := 0
	if windows && strings.HasPrefix(s, `\\?\`) {
		n = 4
	}
	if windows && hasDrive(s[n:]) {
		n += 2
	}
	file, image, _ = strings.Cut(s[n:], ":")
	return s[:n] + file, image
}

// hasDrive reports whether a path begins with a drive and the root of it. Without the
// root, a letter is a directory: "oci:c:1" is image 1 in c, as elsewhere.
func hasDrive(s string) bool {
	return len(s) > 2 && s[1] == ':' && (s[2] == '\\' || s[2] == '/') && (s[0]|0x20 >= 'a' && s[0]|0x20 <= 'z')
}

func (n Name) String() string {
	s := n.Transport + ":"
	switch {
	case n.Transport == Registry:
		return s + "//" + n.Image
	case n.Transport == Containerd:
		return s + n.Image
	case n.Image != "":
		return s + n.Path + ":" + n.Image
	}
	return s + n.Path
}

// Source is an image that can be read. Its blobs have to be read in order, and are
// checked against their digests.
type Source interface {
	content.Provider
	content.InfoProvider
	// Resolve returns what the image's name stands for, or an error that wraps
	// [errdefs.ErrNotFound].
	Resolve(ctx context.Context) (ocispec.Descriptor, error)
	Close() error
}

// Target is where an image can be written to. What is in the way of an image is
// found out by Resolve.
type Target interface {
	Source
	content.Ingester
	Abort(ctx context.Context, ref string) error
	Update(ctx context.Context, info content.Info, fieldpaths ...string) (content.Info, error)
	// Copy brings a blob there.
	Copy(ctx context.Context, from content.Provider, desc ocispec.Descriptor) (registry.Origin, error)
	// Document brings a manifest or an index there, after what it lists.
	Document(ctx context.Context, from content.Provider, desc ocispec.Descriptor) error
	// Name makes the target's name stand for desc, which is there.
	Name(ctx context.Context, from content.Provider, desc ocispec.Descriptor) error
}

// OpenSource opens an image to be read. Containerd's are the caller's business.
func OpenSource(ctx context.Context, n Name, hosts docker.RegistryHosts) (Source, error) {
	switch n.Transport {
	case Registry:
		r, err := registry.Open(ctx, n.Image, hosts)
		if err != nil {
			return nil, err
		}
		return registryImage{r}, nil
	case OCI:
		l, err := layout.Open(n.Path)
		if err != nil {
			return nil, err
		}
		return &named{l, l.Resolve, n.Image}, nil
	case OCIArchive:
		a, err := archive.Open(n.Path)
		if err != nil {
			return nil, err
		}
		return &named{a, a.Resolve, n.Image}, nil
	case DockerArchive:
		a, err := archive.OpenDocker(n.Path)
		if err != nil {
			return nil, err
		}
		return &named{a, a.Resolve, n.Image}, nil
	}
	return nil, fmt.Errorf("%w: %s: images can't be read there", ErrName, n)
}

// OpenTarget opens a place for an image to be written to.
func OpenTarget(ctx context.Context, n Name, hosts docker.RegistryHosts) (Target, error) {
	switch n.Transport {
	case Registry:
		if spec, err := reference.Parse(n.Image); err == nil && spec.Digest() != "" {
			return nil, fmt.Errorf("%w: %s names an image by its digest, which a new one does not have yet: give a tag", ErrName, n)
		}
		r, err := registry.Open(ctx, n.Image, hosts)
		if err != nil {
			return nil, err
		}
		return registryImage{r}, nil
	case OCI:
		return &newLayout{dir: n.Path, name: n.Image}, nil
	case OCIArchive:
		w, err := archive.Create(n.Path)
		if err != nil {
			return nil, err
		}
		return &newArchive{w, n}, nil
	case DockerArchive:
		return nil, fmt.Errorf("%w: %s: an encrypted image can't be kept in Docker's format: write oci-archive:%s", ErrName, n, n.Path)
	}
	return nil, fmt.Errorf("%w: %s: images can't be written there", ErrName, n)
}

type readable interface {
	content.Provider
	content.InfoProvider
	Close() error
}

// named is an image in a place that resolves names.
type named struct {
	readable
	resolve func(context.Context, string) (ocispec.Descriptor, error)
	name    string
}

func (n *named) Resolve(ctx context.Context) (ocispec.Descriptor, error) {
	return n.resolve(ctx, n.name)
}

type registryImage struct{ *registry.Repository }

func (registryImage) Close() error { return nil }

func (r registryImage) Copy(ctx context.Context, from content.Provider, desc ocispec.Descriptor) (registry.Origin, error) {
	if other, ok := from.(registryImage); ok {
		from = other.Repository
	}
	return r.Repository.Copy(ctx, from, desc)
}

func (r registryImage) Document(ctx context.Context, from content.Provider, desc ocispec.Descriptor) error {
	return r.Push(ctx, from, desc, false)
}

func (r registryImage) Name(ctx context.Context, from content.Provider, desc ocispec.Descriptor) error {
	return r.Push(ctx, from, desc, true)
}

// newLayout is an image in a layout, which is made when the first blob is written.
type newLayout struct {
	dir, name string

	mu     sync.Mutex
	layout *layout.Layout
}

// open opens the layout, and makes it if create is set.
func (l *newLayout) open(create bool) (*layout.Layout, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.layout != nil {
		return l.layout, nil
	}
	open := layout.Open
	if create {
		open = layout.Create
	}
	opened, err := open(l.dir)
	if err != nil {
		return nil, err
	}
	l.layout = opened
	return opened, nil
}

func (l *newLayout) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.layout == nil {
		return nil
	}
	return l.layout.Close()
}

func (l *newLayout) Resolve(ctx context.Context) (ocispec.Descriptor, error) {
	opened, err := l.open(false)
	if errors.Is(err, fs.ErrNotExist) {
		return ocispec.Descriptor{}, fmt.Errorf("%s: %w", l.dir, errdefs.ErrNotFound)
	}
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if l.name == "" {
		return ocispec.Descriptor{}, errdefs.ErrNotFound // another image is added
	}
	return opened.Resolve(ctx, l.name)
}

func (l *newLayout) Info(ctx context.Context, d digest.Digest) (content.Info, error) {
	opened, err := l.open(true)
	if err != nil {
		return content.Info{}, err
	}
	return opened.Info(ctx, d)
}

func (l *newLayout) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	opened, err := l.open(true)
	if err != nil {
		return nil, err
	}
	return opened.ReaderAt(ctx, desc)
}

func (l *newLayout) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	opened, err := l.open(true)
	if err != nil {
		return nil, err
	}
	return opened.Writer(ctx, opts...)
}

func (l *newLayout) Abort(context.Context, string) error { return nil }

func (l *newLayout) Update(_ context.Context, info content.Info, _ ...string) (content.Info, error) {
	return info, nil
}

func (l *newLayout) Copy(ctx context.Context, from content.Provider, desc ocispec.Descriptor) (registry.Origin, error) {
	return CopyBlob(ctx, l, from, desc)
}

func (l *newLayout) Document(ctx context.Context, from content.Provider, desc ocispec.Descriptor) error {
	_, err := CopyBlob(ctx, l, from, desc)
	return err
}

func (l *newLayout) Name(ctx context.Context, from content.Provider, desc ocispec.Descriptor) error {
	if err := l.Document(ctx, from, desc); err != nil {
		return err
	}
	opened, err := l.open(true)
	if err != nil {
		return err
	}
	return opened.Tag(ctx, desc, l.name)
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
	if _, err := os.Lstat(a.to.Path); errors.Is(err, fs.ErrNotExist) {
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

func (a *newArchive) Copy(ctx context.Context, from content.Provider, desc ocispec.Descriptor) (registry.Origin, error) {
	return CopyBlob(ctx, a, from, desc)
}

func (a *newArchive) Document(ctx context.Context, from content.Provider, desc ocispec.Descriptor) error {
	_, err := CopyBlob(ctx, a, from, desc)
	return err
}

func (a *newArchive) Name(ctx context.Context, from content.Provider, desc ocispec.Descriptor) error {
	if err := a.Document(ctx, from, desc); err != nil {
		return err
	}
	return a.Finish(desc, a.to.Image)
}

// CopyBlob copies a blob to a place that lacks it.
func CopyBlob(ctx context.Context, to interface {
	content.InfoProvider
	content.Ingester
}, from content.Provider, desc ocispec.Descriptor) (registry.Origin, error) {
	if info, err := to.Info(ctx, desc.Digest); err == nil && info.Size == desc.Size {
		return registry.Present, nil
	} else if err != nil && !errdefs.IsNotFound(err) {
		return "", err
	}
	ra, err := from.ReaderAt(ctx, desc)
	if err != nil {
		return "", err
	}
	defer ra.Close()
	if ra.Size() != desc.Size {
		return "", fmt.Errorf("blob %s has %d bytes, and its descriptor says %d", desc.Digest, ra.Size(), desc.Size)
	}
	w, err := to.Writer(ctx, content.WithRef("copy-"+desc.Digest.Encoded()), content.WithDescriptor(ocispec.Descriptor{Size: desc.Size}))
	if err != nil {
		return "", err
	}
	defer w.Close()
	if err := copyAll(ctx, w, ra); err != nil {
		return "", fmt.Errorf("copy %s: %w", desc.Digest, err)
	}
	return registry.Copied, w.Commit(ctx, desc.Size, desc.Digest)
}

// Pair is the store of an image that is read in one place and written in another.
type Pair struct {
	Source
	target  Target
	written *digests
	taken   *taken
}

// NewPair returns the store of an image that is read from one place and written to
// another.
func NewPair(from Source, to Target) *Pair {
	return &Pair{Source: from, target: to, written: newDigests(), taken: &taken{digests: newDigests()}}
}

var _ interface {
	content.Provider
	content.InfoProvider
	content.Ingester
} = (*Pair)(nil)

// Info returns the size of a blob in either place.
func (p *Pair) Info(ctx context.Context, d digest.Digest) (content.Info, error) {
	if p.written.has(d) {
		return p.target.Info(ctx, d)
	}
	return p.Source.Info(ctx, d)
}

// ReaderAt returns a reader of a blob in either place.
func (p *Pair) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if p.written.has(desc.Digest) {
		return p.target.ReaderAt(ctx, desc)
	}
	return p.Source.ReaderAt(ctx, desc)
}

// Writer returns a writer of a new blob in the target.
func (p *Pair) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	w, err := p.target.Writer(ctx, opts...)
	if err != nil {
		return nil, err
	}
	return noting{w, p.written}, nil
}

// Abort ends a writer.
func (p *Pair) Abort(ctx context.Context, ref string) error { return p.target.Abort(ctx, ref) }

// Update changes the labels of a blob in the target.
func (p *Pair) Update(ctx context.Context, info content.Info, fieldpaths ...string) (content.Info, error) {
	return p.target.Update(ctx, info, fieldpaths...)
}

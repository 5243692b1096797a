// Package registry lets package image work on images in a registry. Blobs are read
// and written as they pass: nothing is kept on disk, and no more of a blob in memory
// than a chunk of 5 MiB.
//
// It asks registries by containerd's client, with the hosts, credentials and mirrors
// that [docker.RegistryHosts] says. Uploads are its own, since containerd's need to
// know a blob's digest before its first byte.
package registry

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/ingest"
	"github.com/ctrlplane/pilot/internal/verified"
)

const (
	// maxDocument bounds a manifest or an index, in bytes: what containerd takes.
	maxDocument = 8 << 20
	// maxKept bounds the documents that were read and are kept, since package image
	// reads them several times, in bytes.
	maxKept = 16 << 20
)

// Repository is one repository of a registry. Manifests that are written to it are
// kept until [Repository.Push], since registries take none whose blobs are not there.
type Repository struct {
	spec     reference.Spec
	resolver remotes.Resolver
	fetcher  remotes.Fetcher
	pull     []*host // that have blobs and manifests, in the order in which they are asked
	resolve  []*host // that have tags and the list of them
	push     *host   // nil if no host takes pushes
	// referrers has the list of referrers that counts: a mirror that is not configured to
	// have it may lack some. nil if there is no such host.
	referrers *host

	mu        sync.Mutex
	documents map[digest.Digest]document // that are to be pushed
	kept      map[digest.Digest][]byte   // that were read, of no more than maxKept
	room      int                        // for more of them
	blobs     map[digest.Digest]int64    // that are known to be there, with their sizes
}

type document struct {
	mediaType string
	content   []byte
}

// Open returns the repository of an image's name, such as
// registry.example.com/team/app:1 or registry.example.com/team/app@sha256:….
func Open(ctx context.Context, name string, hosts docker.RegistryHosts) (*Repository, error) {
	spec, err := reference.Parse(name)
	if err != nil {
		return nil, fmt.Errorf("%q: %w", name, err)
	}
	hosts = Guarded(hosts)
	resolver := docker.NewResolver(docker.ResolverOptions{Hosts: hosts})
	fetcher, err := resolver.Fetcher(ctx, name)
	if err != nil {
		return nil, err
	}
	r := &Repository{spec: spec, resolver: resolver, fetcher: fetcher, documents: map[digest.Digest]document{}, kept: map[digest.Digest][]byte{}, room: maxKept, blobs: map[digest.Digest]int64{}}
	list, err := hosts(spec.Hostname())
	if err != nil {
		return nil, err
	}
	with := func(capability docker.HostCapabilities) (found []*host) {
		for _, h := range list {
			if h.Capabilities.Has(capability) {
				found = append(found, newHost(h, spec))
			}
		}
		return found
	}
	r.pull, r.resolve = with(docker.HostCapabilityPull), with(docker.HostCapabilityResolve)
	r.push = first(with(docker.HostCapabilityPush))
	r.referrers = cmp.Or(first(with(docker.HostCapabilityReferrers)), r.push, first(r.resolve))
	return r, nil
}

// OpenToPush returns a repository as the host has it that takes pushes. The others may be
// mirrors, so they are not asked what is there.
func OpenToPush(ctx context.Context, name string, hosts docker.RegistryHosts) (*Repository, error) {
	return Open(ctx, name, func(registry string) ([]docker.RegistryHost, error) {
		list, err := hosts(registry)
		if err != nil {
			return nil, err
		}
		i := slices.IndexFunc(list, func(h docker.RegistryHost) bool { return h.Capabilities.Has(docker.HostCapabilityPush) })
		if i < 0 {
			return nil, errNoPush(registry)
		}
		only := list[i]
		only.Capabilities |= docker.HostCapabilityPull | docker.HostCapabilityResolve
		return []docker.RegistryHost{only}, nil
	})
}

func errNoPush(registry string) error { return fmt.Errorf("no host of %s takes pushes", registry) }

func newHost(h docker.RegistryHost, spec reference.Spec) *host {
	n := &host{RegistryHost: h, repository: strings.TrimPrefix(spec.Locator, spec.Hostname()+"/")}
	if own, err := docker.DefaultHost(spec.Hostname()); err != nil || h.Host != own && h.Host != spec.Hostname() {
		n.namespace = spec.Hostname()
	}
	return n
}

func first(list []*host) *host {
	if len(list) == 0 {
		return nil
	}
	return list[0]
}

// Holds reports whether all that other reads is where r pushes: in the same repository, at
// the same host.
func (r *Repository) Holds(other *Repository) bool {
	elsewhere := func(h *host) bool {
		return r.push == nil || h.Scheme != r.push.Scheme || h.Host != r.push.Host || h.Path != r.push.Path
	}
	return r.spec.Locator == other.spec.Locator && !slices.ContainsFunc(other.pull, elsewhere)
}

// Name returns the name that the repository was opened with.
func (r *Repository) Name() string { return r.spec.String() }

// Tag returns the tag that the repository was opened with.
func (r *Repository) Tag() string {
	tag, _, _ := strings.Cut(r.spec.Object, "@")
	return tag
}

// Resolve returns what the name stands for. The error wraps [errdefs.ErrNotFound] if
// it stands for nothing.
func (r *Repository) Resolve(ctx context.Context) (ocispec.Descriptor, error) {
	ctx, cancel := context.WithTimeout(ctx, requestWithin)
	defer cancel()
	return r.lookUp(ctx, r.spec.String())
}

func (r *Repository) lookUp(ctx context.Context, name string) (ocispec.Descriptor, error) {
	_, desc, err := r.resolver.Resolve(ctx, name)
	if err = plainly(r.spec.Hostname(), err); errdefs.IsNotFound(err) {
		err = &Error{"not found in the registry", err}
	}
	return desc, err
}

// Info returns the size of a blob or a manifest, or [errdefs.ErrNotFound].
func (r *Repository) Info(ctx context.Context, d digest.Digest) (content.Info, error) {
	r.mu.Lock()
	doc, ok := r.documents[d]
	kept, read := r.kept[d]
	size, known := r.blobs[d]
	r.mu.Unlock()
	if ok {
		return content.Info{Digest: d, Size: int64(len(doc.content))}, nil
	}
	if read {
		return content.Info{Digest: d, Size: int64(len(kept))}, nil
	}
	if known {
		return content.Info{Digest: d, Size: size}, nil
	}
	// A blob is asked for by HEAD: what containerd does opens it besides.
	pulling, err := docker.ContextWithRepositoryScope(ctx, r.spec, false)
	if err != nil {
		return content.Info{}, err
	}
	for _, h := range r.pull {
		if here, err := r.hasBlob(pulling, h, d); err == nil && here {
			return r.Info(ctx, d)
		}
	}
	byDigest, ok := r.fetcher.(remotes.FetcherByDigest)
	if !ok {
		return content.Info{}, fmt.Errorf("look for %s: %w", d, errdefs.ErrNotImplemented)
	}
	ctx, cancel := context.WithTimeout(ctx, requestWithin)
	defer cancel()
	body, desc, err := byDigest.FetchByDigest(ctx, d)
	if err != nil {
		return content.Info{}, plainly(r.spec.Hostname(), err)
	}
	if err := body.Close(); err != nil {
		return content.Info{}, err
	}
	return content.Info{Digest: d, Size: desc.Size}, nil
}

// ReaderAt returns a reader of a blob or a manifest, which has to be read in order, and
// is checked against its digest before its last byte is given out. A connection that
// breaks is made again.
func (r *Repository) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	r.mu.Lock()
	doc, ok := r.documents[desc.Digest]
	kept, read := r.kept[desc.Digest]
	r.mu.Unlock()
	if ok {
		return memory{bytes.NewReader(doc.content)}, nil
	}
	if read {
		return memory{bytes.NewReader(kept)}, nil
	}
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w", desc.Digest, err)
	}
	if IsDocument(desc.MediaType) && desc.Size > maxDocument {
		return nil, fmt.Errorf("%w: %s has %d bytes, more than %d", ErrTooLarge, desc.Digest, desc.Size, maxDocument)
	}
	s, err := r.open(ctx, desc)
	if err != nil {
		return nil, err
	}
	ra, err := verified.New(s, desc)
	if err != nil || !IsDocument(desc.MediaType) {
		return ra, err
	}
	return r.keep(ra, desc)
}

// keep reads a document and keeps it.
func (r *Repository) keep(ra content.ReaderAt, desc ocispec.Descriptor) (content.ReaderAt, error) {
	defer ra.Close()
	b := make([]byte, desc.Size)
	if n, err := ra.ReadAt(b, 0); n < len(b) {
		return nil, fmt.Errorf("read %s: %w", desc.Digest, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(b) <= r.room {
		r.kept[desc.Digest], r.room = b, r.room-len(b)
	}
	return memory{bytes.NewReader(b)}, nil
}

// Writer returns a writer of a new blob, or of a new manifest, as the media type says
// that [content.WithDescriptor] gives.
func (r *Repository) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	var o content.WriterOpts
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return nil, err
		}
	}
	if IsDocument(o.Desc.MediaType) {
		return &documentWriter{Blob: ingest.New(o.Ref, o.Desc.Size), repo: r, mediaType: o.Desc.MediaType}, nil
	}
	ctx, err := r.pushing(ctx)
	if err != nil {
		return nil, err
	}
	return newUpload(ctx, r, o.Ref, o.Desc.Size), nil
}

// pushing returns a context with which requests get the right to push.
func (r *Repository) pushing(ctx context.Context) (context.Context, error) {
	if r.push == nil {
		return nil, errNoPush(r.spec.Hostname())
	}
	return docker.ContextWithRepositoryScope(ctx, r.spec, true)
}

// Abort does nothing: closing a writer ends its upload.
func (r *Repository) Abort(context.Context, string) error { return nil }

// Update does nothing: a registry keeps no labels.
func (r *Repository) Update(_ context.Context, info content.Info, _ ...string) (content.Info, error) {
	return info, nil
}

// note remembers that a blob is there.
func (r *Repository) note(d digest.Digest, size int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.blobs[d] = size
}

// checkSize compares a blob that is there with its descriptor, as far as the registry says
// what it has. Registries check digests when they get blobs, so they are not read back.
func (r *Repository) checkSize(desc ocispec.Descriptor) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if size, ok := r.blobs[desc.Digest]; ok && size >= 0 && size != desc.Size {
		return fmt.Errorf("%s has %d bytes of %s, and its descriptor says %d: the registry's storage or the manifest is damaged", r.push.Host, size, desc.Digest, desc.Size)
	}
	return nil
}

// hasBlob reports whether a host has a blob.
func (r *Repository) hasBlob(ctx context.Context, h *host, d digest.Digest) (bool, error) {
	r.mu.Lock()
	_, known := r.blobs[d]
	r.mu.Unlock()
	if known {
		return true, nil
	}
	resp, err := h.do(ctx, request{method: http.MethodHead, url: h.url(nil, "blobs", d.String())}, http.StatusOK)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if got := resp.Header.Get("Docker-Content-Digest"); got != "" && got != d.String() {
		return false, fmt.Errorf("%s was asked for %s and has %.100q instead", h.Host, d, got)
	}
	r.note(d, resp.ContentLength)
	return true, nil
}

// Origin says how a blob came into a repository.
type Origin string

// How a blob came into a repository.
const (
	Present Origin = "present" // it was there
	Mounted Origin = "mounted" // the registry had it in the source's repository
	Copied  Origin = "copied"  // it was uploaded
)

// Copy brings a blob into the repository, in the way that moves the least: from may be
// a Repository of the same registry.
func (r *Repository) Copy(ctx context.Context, from content.Provider, desc ocispec.Descriptor) (Origin, error) {
	ctx, err := r.pushing(ctx)
	if err != nil {
		return "", err
	}
	if here, err := r.hasBlob(ctx, r.push, desc.Digest); err != nil || here {
		return Present, errors.Join(err, r.checkSize(desc))
	}
	if other, ok := from.(*Repository); ok && r.mountsFrom(other) {
		mounted, err := r.mount(ctx, desc, other.push.repository)
		if err != nil || mounted {
			return Mounted, err
		}
	}
	ra, err := from.ReaderAt(ctx, desc)
	if err != nil {
		return "", err
	}
	defer ra.Close()
	u := newUpload(ctx, r, "copy-"+desc.Digest.Encoded(), desc.Size)
	defer u.Close()
	if _, err := io.Copy(u, io.NewSectionReader(ra, 0, desc.Size)); err != nil {
		return "", err
	}
	return Copied, u.Commit(ctx, desc.Size, desc.Digest)
}

// mountsFrom reports whether r's registry may have other's blobs.
func (r *Repository) mountsFrom(other *Repository) bool {
	return other.push != nil && r.spec.Hostname() == other.spec.Hostname() && r.push.Host == other.push.Host &&
		r.push.repository != other.push.repository
}

// mount asks the registry to take a blob over from another of its repositories.
func (r *Repository) mount(ctx context.Context, desc ocispec.Descriptor, repository string) (bool, error) {
	ctx = docker.ContextWithAppendPullRepositoryScope(ctx, repository)
	u := r.push.url(url.Values{"mount": {desc.Digest.String()}, "from": {repository}}, "blobs", "uploads/")
	resp, err := r.push.do(ctx, request{method: http.MethodPost, url: u, header: http.Header{"Content-Length": {"0"}}},
		http.StatusCreated, http.StatusAccepted, http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound)
	if err != nil {
		return false, fmt.Errorf("mount %s from %s: %w", desc.Digest, repository, err)
	}
	if resp.StatusCode == http.StatusCreated {
		r.note(desc.Digest, desc.Size)
		return true, nil
	}
	if location, err := resp.Request.URL.Parse(resp.Header.Get("Location")); err == nil && resp.StatusCode == http.StatusAccepted {
		// It began an upload instead, which is not needed.
		_, _ = r.push.do(ctx, request{method: http.MethodDelete, url: location, once: true}, http.StatusNoContent, http.StatusAccepted, http.StatusNotFound)
	}
	return false, nil
}

// Push pushes a manifest or an index, whose blobs and manifests are there, from a
// provider that has it, by its digest or a tag.
func (r *Repository) Push(ctx context.Context, from content.Provider, desc ocispec.Descriptor, object string) error {
	_, err := r.put(ctx, from, desc, object)
	return err
}

func (r *Repository) put(ctx context.Context, from content.Provider, desc ocispec.Descriptor, object string) (*http.Response, error) {
	ctx, err := r.pushing(ctx)
	if err != nil {
		return nil, err
	}
	doc, err := content.ReadBlob(ctx, from, desc)
	if err != nil {
		return nil, err
	}
	var resp *http.Response
	for n := 1; ; n++ {
		resp, err = r.push.do(ctx, request{
			method: http.MethodPut, url: r.push.url(nil, "manifests", object), body: doc,
			header: http.Header{"Content-Type": {desc.MediaType}},
		}, http.StatusCreated, http.StatusOK, http.StatusNoContent, http.StatusAccepted)
		if err == nil {
			break
		}
		if n == manifestAttempts || !isBlobUnknown(err) {
			return nil, err
		}
		if err := pause(ctx, n, nil); err != nil {
			return nil, err
		}
	}
	if got := resp.Header.Get("Docker-Content-Digest"); got != "" && got != desc.Digest.String() {
		return nil, fmt.Errorf("%s keeps the manifest %s as %.100q", resp.Request.URL.Host, desc.Digest, got)
	}
	return resp, nil
}

// manifestAttempts is how often a manifest is pushed before its refusal counts.
const manifestAttempts = 3

// IsDocument reports whether a media type is that of a manifest or an index.
func IsDocument(mediaType string) bool {
	return images.IsManifestType(mediaType) || images.IsIndexType(mediaType)
}

// memory is a document in memory.
type memory struct{ *bytes.Reader }

func (memory) Close() error { return nil }

// documentWriter keeps a manifest until it is pushed.
type documentWriter struct {
	ingest.Blob
	repo      *Repository
	mediaType string
	b         []byte
}

func (w *documentWriter) Write(p []byte) (int, error) {
	if len(w.b)+len(p) > maxDocument {
		return 0, fmt.Errorf("a manifest has more than %d bytes", maxDocument)
	}
	w.b = append(w.b, p...)
	w.Add(p)
	return len(p), nil
}

func (w *documentWriter) Commit(_ context.Context, size int64, expected digest.Digest, _ ...content.Opt) error {
	if err := w.Check(size, expected); err != nil {
		return err
	}
	w.repo.mu.Lock()
	defer w.repo.mu.Unlock()
	w.repo.documents[w.Digest()] = document{w.mediaType, slices.Clone(w.b)}
	return nil
}

func (w *documentWriter) Truncate(size int64) error {
	if size != 0 {
		return errdefs.ErrNotImplemented
	}
	w.b = nil
	w.Reset()
	return nil
}

func (w *documentWriter) Close() error { return nil }

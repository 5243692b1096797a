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
	"fmt"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/image/archive"
	"github.com/ctrlplane/pilot/image/layout"
	"github.com/ctrlplane/pilot/image/registry"
)

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
	// Name brings a manifest or an index there and makes the target's name stand for
	// it. Unless before is nil, the error wraps [errdefs.ErrConflict] if the name
	// stands for something else than before, or, if that is empty, for anything.
	Name(ctx context.Context, from content.Provider, desc ocispec.Descriptor, before *digest.Digest) error
	// Holds reports whether the target has all that source has, since both are in the
	// same place.
	Holds(source Source) bool
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
		return &layoutImage{Layout: l, name: n.Image}, nil
	case OCIArchive:
		a, err := archive.Open(n.Path)
		if err != nil {
			return nil, err
		}
		return &archived{a, a.Resolve, n.Image}, nil
	case DockerArchive:
		a, err := archive.OpenDocker(n.Path)
		if err != nil {
			return nil, err
		}
		return &archived{a, a.Resolve, n.Image}, nil
	}
	return nil, fmt.Errorf("%w: %s: images can't be read there", ErrName, n)
}

// OpenTarget opens a place for an image to be written to. Nothing is made there before
// the first blob is written. inPlace says that the image is that of the name already.
func OpenTarget(ctx context.Context, n Name, inPlace bool, hosts docker.RegistryHosts) (Target, error) {
	switch n.Transport {
	case Registry:
		if spec, err := reference.Parse(n.Image); err == nil && spec.Digest() != "" {
			return nil, fmt.Errorf("%w: %s is named by its digest, which changes: give it a new name, with a tag", ErrName, n)
		}
		r, err := registry.OpenToPush(ctx, n.Image, hosts)
		if err != nil {
			return nil, err
		}
		return registryImage{r}, nil
	case OCI:
		return &layoutImage{layout.New(n.Path), n.Image, n.Image == "" && !inPlace}, nil
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

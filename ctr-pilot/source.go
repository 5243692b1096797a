package main

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/content"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// source is where images are: a containerd or a registry.
type source interface {
	// names returns the names of the images that match a pattern.
	names(ctx context.Context, pattern string) ([]string, error)
	// open returns an image that is to get a new name, or its own.
	open(ctx context.Context, name, newName string) (*openImage, error)
	// absent returns why a manifest may be missing, for a warning.
	absent() string
}

// openImage is an image and the content that it can be read from.
type openImage struct {
	content.Store
	target ocispec.Descriptor
	// commit gives the new name to target, which is in the Store.
	commit func(ctx context.Context, target ocispec.Descriptor) error
}

// errTaken is the error of a new name that another image has. It may have been meant
// as the second of two images.
func errTaken(newName string) error {
	return fmt.Errorf("image %s already exists: remove it first, or use --file or a pattern to rewrap both", newName)
}

// errDigest is the error of a name that can't be that of another image.
func errDigest(name string) error {
	return fmt.Errorf("%s is named by its digest, which changes: give it a new name", name)
}

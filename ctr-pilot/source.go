package main

import (
	"context"
	"fmt"
	"strings"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/glob"
	"github.com/ctrlplane/pilot/plugin"
)

// place is where images are: a containerd or a registry.
type place interface {
	// names returns the names of the images that match a pattern.
	names(ctx context.Context, pattern string) ([]string, error)
	// open returns an image, to be given a new name or its own.
	open(ctx context.Context, name, newName string) (*openImage, error)
	// absent says what it means that a manifest is not there.
	absent() string
}

// openImage is an image and the content that it can be read from.
type openImage struct {
	content.Store
	target ocispec.Descriptor
	// commit makes the new name that of target, which is in the Store.
	commit func(ctx context.Context, target ocispec.Descriptor) error
}

// errTaken is the error of a new name that an image has. It may have been meant
// as the second of two images.
func errTaken(newName string) error {
	return fmt.Errorf("there is an image %s already: remove it first, or use --file or a pattern to rewrap both", newName)
}

// errDigest is the error of a name that can't be that of another image.
func errDigest(name string) error {
	return fmt.Errorf("%s is named by its digest, which changes: give it a new name", name)
}

// inContainerd are a containerd's images.
type inContainerd struct{ client *containerd.Client }

func (c inContainerd) absent() string {
	return "its content is not here (pull it with --all-platforms)"
}

func (c inContainerd) names(ctx context.Context, pattern string) ([]string, error) {
	all, err := c.client.ImageService().List(ctx)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, img := range all {
		if glob.MatchName(pattern, img.Name) && !namedByDigest(img.Name) {
			names = append(names, img.Name)
		}
	}
	return names, nil
}

// namedByDigest reports whether a name says which image it is of: NAME@DIGEST, or
// the digest of its configuration, as CRI names it.
func namedByDigest(name string) bool {
	return strings.Contains(name, "@") || strings.HasPrefix(name, "sha256:")
}

func (c inContainerd) open(ctx context.Context, name, toName string) (*openImage, error) {
	store := c.client.ImageService()
	img, err := getImage(ctx, c.client, name)
	if err != nil {
		return nil, err
	}
	to := newName{store: store, from: img, name: toName}
	if err := to.check(ctx); err != nil {
		if errdefs.IsAlreadyExists(err) {
			err = errTaken(toName)
		}
		return nil, err
	}
	return &openImage{plugin.Store(c.client), img.Target, to.set}, nil
}

package main

import (
	"context"
	"fmt"
	"strings"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/image/registry"
	"github.com/ctrlplane/pilot/image/transport"
	"github.com/ctrlplane/pilot/internal/localstore"
)

// containerdImage is an image in containerd, as [transport.Target].
type containerdImage struct {
	image.Store
	client *containerd.Client
	name   string
	image  images.Image // of a source that was resolved
	to     *newName     // of a target
}

// inContainerd returns a target in containerd. The image has the labels of the source, if
// that is in containerd too.
func (p *places) inContainerd(name string, source transport.Source, force bool) *containerdImage {
	to := &newName{store: p.client.ImageService(), name: name, force: force}
	if from, ok := source.(*containerdImage); ok {
		to.from = from.image
	}
	return &containerdImage{Store: localstore.New(p.client), client: p.client, name: name, to: to}
}

func (c *containerdImage) Resolve(ctx context.Context) (ocispec.Descriptor, error) {
	if c.to != nil {
		img, err := c.client.ImageService().Get(ctx, c.name)
		return img.Target, err
	}
	var err error
	c.image, err = getImage(ctx, c.client, c.name)
	if errdefs.IsNotFound(err) {
		err = fmt.Errorf("%w%s", err, meantTransport(c.name))
	}
	return c.image.Target, err
}

func (c *containerdImage) Close() error { return nil }

func (c *containerdImage) Holds(source transport.Source) bool {
	_, ok := source.(*containerdImage)
	return ok
}

func (c *containerdImage) Copy(ctx context.Context, from content.Provider, desc ocispec.Descriptor) (registry.Origin, error) {
	return transport.CopyBlob(ctx, c, from, desc)
}

func (c *containerdImage) Document(ctx context.Context, from content.Provider, desc ocispec.Descriptor) error {
	if _, err := c.Copy(ctx, from, desc); err != nil {
		return err
	}
	// containerd's garbage collector follows labels.
	_, err := images.SetChildrenMappedLabels(c.client.ContentStore(), images.ChildrenHandler(c.client.ContentStore()), images.ChildGCLabels)(ctx, desc)
	return err
}

// Name compares what the name stands for by itself, with what the source was.
func (c *containerdImage) Name(ctx context.Context, from content.Provider, desc ocispec.Descriptor, _ *digest.Digest) error {
	if c.to.from.Name == "" { // from elsewhere
		if err := c.Document(ctx, from, desc); err != nil {
			return err
		}
	}
	return c.to.set(ctx, desc)
}

// Referrers lists the images that cosign's tags of the same repository name. What a
// registry lists as referrers is not pulled.
func (c *containerdImage) Referrers(ctx context.Context, d digest.Digest) ([]registry.Referrer, error) {
	repository, _, _ := strings.Cut(c.name, "@")
	if colon := strings.LastIndex(repository, ":"); colon > strings.LastIndex(repository, "/") {
		repository = repository[:colon]
	}
	var found []registry.Referrer
	for _, suffix := range registry.CosignSuffixes {
		tag := registry.ReferrersTag(d) + "." + suffix
		img, err := c.client.ImageService().Get(ctx, repository+":"+tag)
		if err == nil {
			found = append(found, registry.Referrer{Descriptor: img.Target, Type: suffix, Tag: tag})
		} else if !errdefs.IsNotFound(err) {
			return found, err
		}
	}
	return found, nil
}

package main

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/image/transport"
)

// keysFrom returns the layers of the images that --keys-from names. They are
// images of containerd, or else of a registry, of which only manifests are
// fetched.
func keysFrom(ctx context.Context, at workplace, cmd *cli.Command) ([]ocispec.Descriptor, error) {
	var all []ocispec.Descriptor
	for _, name := range cmd.StringSlice("keys-from") {
		layers, err := at.layersOf(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("--keys-from %s: %w", name, err)
		}
		all = append(all, layers...)
	}
	return all, nil
}

// layersOf returns the layers of an image in containerd, or else in its registry.
func (p *places) layersOfEither(ctx context.Context, name string) ([]ocispec.Descriptor, error) {
	img, err := p.client.ImageService().Get(ctx, name)
	if err == nil {
		return layerDescriptors(ctx, p.client.ContentStore(), img.Target, image.Options{})
	}
	if !errdefs.IsNotFound(err) {
		return nil, err
	}
	n, err := parseName(transport.Registry + "://" + name)
	if err != nil {
		return nil, err
	}
	layers, err := p.layersIn(ctx, n)
	if err != nil {
		return nil, fmt.Errorf("it is not an image in this namespace of containerd, and its registry returned: %w", err)
	}
	return layers, nil
}

// layersIn returns the layers of an image where its name says.
func (p *places) layersIn(ctx context.Context, n transport.Name) ([]ocispec.Descriptor, error) {
	source, err := p.source(ctx, n)
	if err != nil {
		return nil, err
	}
	defer source.Close()
	target, err := source.Resolve(ctx)
	if err != nil {
		return nil, err
	}
	return layerDescriptors(ctx, transport.NewPair(source, nil), target, image.Options{})
}

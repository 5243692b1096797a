package main

import (
	"context"
	"fmt"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/image"
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

func layersOf(ctx context.Context, client *containerd.Client, cmd *cli.Command, name string) ([]ocispec.Descriptor, error) {
	img, err := client.ImageService().Get(ctx, name)
	if err == nil {
		return layerDescriptors(ctx, client.ContentStore(), img.Target, image.Options{})
	}
	if !errdefs.IsNotFound(err) {
		return nil, err
	}
	registry, err := openRegistry(ctx, cmd)
	if err != nil {
		return nil, err
	}
	defer registry.close()
	store, target, err := registry.read(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("it is not an image in this namespace of containerd, and its registry returned: %w", err)
	}
	return layerDescriptors(ctx, store, target, image.Options{})
}

// read returns what an image in a registry is, and a store that has its manifests.
func (r *inRegistry) read(ctx context.Context, name string) (content.Store, ocispec.Descriptor, error) {
	if _, err := parseReference(name); err != nil {
		return nil, ocispec.Descriptor{}, err
	}
	resolver := docker.NewResolver(docker.ResolverOptions{Hosts: r.hosts})
	target, err := resolve(ctx, resolver, name)
	if err != nil {
		return nil, ocispec.Descriptor{}, err
	}
	fetcher, err := resolver.Fetcher(ctx, name)
	return newDocuments(r, fetcher), target, err
}

package image

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// Layer is a layer of an image.
type Layer struct {
	// Index is its number in its manifest, from 0 at the bottom.
	Index int
	// Platform is that of its manifest, or nil if it is not known.
	Platform *ocispec.Platform
	// Descriptor describes its blob.
	Descriptor ocispec.Descriptor
}

// Layers returns the selected layers of an image, of any media type, manifest by
// manifest in the order of the index, each manifest once. Those of manifests that are
// not in the store are left out.
func Layers(ctx context.Context, store Store, target ocispec.Descriptor, opts Options) ([]Layer, error) {
	w := newWork(store, opts, inspecting, nil)
	if _, err := w.visit(ctx, target, 0); err != nil {
		return nil, err
	}
	return w.list(visitKey(target)), w.checkSelection()
}

// CheckAccess checks that the key of each encrypted layer of the image can be
// unwrapped, for the platform that p prefers. It reads no layer.
func CheckAccess(ctx context.Context, store Store, target ocispec.Descriptor, keys processor.Keys, p platforms.MatchComparer) error {
	manifest, err := images.Manifest(ctx, store, target, p)
	if err != nil {
		return err
	}
	for _, l := range manifest.Layers {
		if !processor.IsEncrypted(l.MediaType) {
			continue
		}
		key, err := processor.Unwrap(ctx, keys, l)
		if err != nil {
			return fmt.Errorf("layer %s: %w", l.Digest, err)
		}
		key.Clear()
	}
	return nil
}

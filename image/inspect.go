package image

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// Layer is a layer of an image.
type Layer struct {
	// Index is its number in its manifest, from 0 at the bottom.
	Index int
	// Platform is that of its manifest, or nil if nothing says it.
	Platform *ocispec.Platform
	// Descriptor describes its blob.
	Descriptor ocispec.Descriptor
}

// Layers returns the selected layers of an image, of whatever media type, manifest
// by manifest. Those of manifests that are not in the store are not among them.
func Layers(ctx context.Context, cs content.Store, target ocispec.Descriptor, opts Options) ([]Layer, error) {
	w := newWork(cs, opts, inspection{})
	var list []Layer
	err := w.visit(ctx, target, 0, func(l Layer, total int) error {
		if w.platform(l.Platform) && w.layer(l.Index, total) {
			list = append(list, l)
		}
		return nil
	})
	if err == nil {
		err = w.checkSelection()
	}
	return list, err
}

// CheckAccess checks that the key of each encrypted layer of the image can be
// unwrapped, for the platform that p prefers. It reads no layer.
func CheckAccess(ctx context.Context, cs content.Store, target ocispec.Descriptor, keys processor.Keys, p platforms.MatchComparer) error {
	manifest, err := images.Manifest(ctx, cs, target, p)
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

// visit calls f for each layer of each manifest, once however often that is listed.
func (w *work) visit(ctx context.Context, desc ocispec.Descriptor, depth int, f func(l Layer, total int) error) error {
	key := visitKey(desc)
	if w.done[key] != nil {
		return nil
	}
	w.done[key] = &visited{}
	doc, err := w.document(ctx, desc)
	if errdefs.IsNotFound(err) && depth > 0 {
		w.platform(desc.Platform) // it has that platform, even if not here
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w", desc.Digest, err)
	}
	switch {
	case isIndex(desc.MediaType):
		if depth >= maxDepth {
			return errDepth(desc.Digest)
		}
		var index ocispec.Index
		if err := json.Unmarshal(doc, &index); err != nil {
			return fmt.Errorf("index %s: %w", desc.Digest, err)
		}
		for _, child := range w.ofSelection(ctx, index.Manifests) {
			if !isIndex(child.MediaType) && !isManifest(child.MediaType) {
				continue
			}
			if err := w.visit(ctx, child, depth+1, f); err != nil {
				return err
			}
		}
		return nil
	case isManifest(desc.MediaType):
		var manifest ocispec.Manifest
		if err := json.Unmarshal(doc, &manifest); err != nil {
			return fmt.Errorf("manifest %s: %w", desc.Digest, err)
		}
		if err := w.usage.manifest(manifest.Layers); err != nil {
			return fmt.Errorf("manifest %s: %w", desc.Digest, err)
		}
		platform := w.platformOf(ctx, desc, manifest)
		for i, l := range manifest.Layers {
			if err := f(Layer{Index: i, Platform: platform, Descriptor: l}, len(manifest.Layers)); err != nil {
				return err
			}
		}
		return nil
	}
	return fmt.Errorf("%s is no image but of type %q", desc.Digest, desc.MediaType)
}

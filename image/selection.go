package image

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// inBase reports whether a layer is one of the base image's.
func (w *work) inBase(l ocispec.Descriptor) bool {
	for _, base := range w.Base {
		if base.Digest == l.Digest {
			return true
		}
	}
	return false
}

// noteLacking notes which of the selected layers a manifest does not have. Attestations
// have none of an image's layers.
func (w *work) noteLacking(p *ocispec.Platform, layers []ocispec.Descriptor) {
	if p != nil && p.OS == "unknown" {
		return
	}
	of := "the image"
	if p != nil {
		of = "platform " + platforms.FormatAll(*p)
	}
	for _, n := range w.Layers {
		if n >= len(layers) || n < -len(layers) {
			w.lacking = append(w.lacking, fmt.Sprintf("%s has %d layers, and no layer %d", of, len(layers), n))
		}
	}
	if len(w.Base) == 0 {
		return
	}
	for _, l := range layers {
		if w.inBase(l) {
			w.hasBase = true
			return
		}
	}
	w.lacking = append(w.lacking, of+" has no layer of the base image")
}

// checkBase returns an error if no manifest was built on the base image.
func (w *work) checkBase() error {
	if len(w.Base) > 0 && !w.hasBase {
		return errors.New("the image has no layer of the base image, so it was not built on it")
	}
	return nil
}

// checkSelection returns an error if layers or platforms that the image does not have are
// selected.
func (w *work) checkSelection() error {
	for i, p := range w.Platforms {
		if !w.matched[i] {
			return fmt.Errorf("the image has no platform %s", platforms.FormatAll(p))
		}
	}
	for _, n := range w.Layers {
		if !w.inRange[n] {
			return fmt.Errorf("the image has no layer %d", n)
		}
	}
	return nil
}

// platformOf returns the platform in the index, or else in the image's configuration, or
// nil if neither has it.
func (w *work) platformOf(ctx context.Context, desc ocispec.Descriptor, m ocispec.Manifest) *ocispec.Platform {
	if desc.Platform != nil {
		return desc.Platform
	}
	if !images.IsConfigType(m.Config.MediaType) {
		return nil
	}
	if info, err := w.Info(ctx, m.Config.Digest); err == nil && info.Size > maxManifest {
		return nil // it would be read into memory
	}
	p, err := images.ConfigPlatform(ctx, w.Store, m.Config)
	if err != nil || p.OS == "" {
		return nil
	}
	return &p
}

// platform reports whether a manifest for p is selected.
func (w *work) selectsPlatform(p *ocispec.Platform) bool {
	if len(w.Platforms) == 0 {
		return true
	}
	if p == nil {
		return false
	}
	found := false
	for i, want := range w.Platforms {
		if platforms.NewMatcher(want).Match(*p) {
			w.matched[i], found = true, true
		}
	}
	return found
}

// layer reports whether layer i of n is selected.
func (w *work) selectsLayer(i, n int) bool {
	found := len(w.Layers) == 0
	for _, l := range w.Layers {
		if l == i || l == i-n {
			w.inRange[l], found = true, true
		}
	}
	return found
}

func ofPlatform(p *ocispec.Platform) string {
	if p == nil {
		return ""
	}
	return " of platform " + platforms.FormatAll(*p)
}

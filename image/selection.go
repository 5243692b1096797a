package image

import (
	"errors"
	"fmt"

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

// checkBase refuses a base image that no manifest was built on.
func (w *work) checkBase() error {
	if len(w.Base) > 0 && !w.hasBase {
		return errors.New("the image has no layer of the base image, so it was not built on it")
	}
	return nil
}

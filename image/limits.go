package image

import (
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ErrLimit is the error of an image that is larger than any in use: a few kilobytes of
// nested indexes can refer to millions of manifests.
var ErrLimit = errors.New("the image exceeds a limit")

const (
	// maxManifest bounds a manifest or an index that is read, in bytes.
	maxManifest = 8 << 20
	// maxPushed bounds a manifest or an index that is written, in bytes:
	// https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#pushing-manifests
	// requires registries to accept at least this, and most accept no more.
	maxPushed = 4 << 20
	// maxDepth bounds how deep indexes are nested.
	maxDepth = 8
	// maxDocuments bounds the manifests and indexes of an image, and
	// maxDocumentBytes their bytes in all.
	maxDocuments     = 1000
	maxDocumentBytes = 256 << 20
	// maxLayers bounds the layers of all manifests.
	maxLayers = 10_000
)

// usage is what was read of an image so far.
type usage struct {
	documents int
	bytes     int64
	layers    int
}

// document counts a manifest or an index that is to be opened.
func (u *usage) document() error {
	if u.documents++; u.documents > maxDocuments {
		return fmt.Errorf("%w: it has more than %d manifests and indexes", ErrLimit, maxDocuments)
	}
	return nil
}

// read counts the bytes of a manifest or an index that is to be read.
func (u *usage) read(size int64) error {
	if size > maxManifest {
		return fmt.Errorf("%w: it has %d bytes, more than %d", ErrLimit, size, maxManifest)
	}
	if u.bytes += size; u.bytes > maxDocumentBytes {
		return fmt.Errorf("%w: its manifests and indexes have more than %d bytes", ErrLimit, maxDocumentBytes)
	}
	return nil
}

// manifest counts a manifest's layers.
func (u *usage) manifest(layers []ocispec.Descriptor) error {
	if u.layers += len(layers); u.layers > maxLayers {
		return fmt.Errorf("%w: its manifests have more than %d layers", ErrLimit, maxLayers)
	}
	return nil
}

// errDepth is the error of an index that is nested too deep.
func errDepth(d digest.Digest) error {
	return fmt.Errorf("index %s: %w: indexes are nested more than %d deep", d, ErrLimit, maxDepth)
}

// checkPushed refuses a manifest or an index that registries would not take.
func checkPushed(doc []byte) error {
	if len(doc) <= maxPushed {
		return nil
	}
	return fmt.Errorf("%w: with its recipients it would have %d bytes, and registries take at most %d: "+
		"name fewer recipients, or one KEK of a key provider that all of them may use", ErrLimit, len(doc), maxPushed)
}

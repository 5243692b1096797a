package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/jsonedit"
	"github.com/ctrlplane/pilot/internal/verified"
)

// Converted is an image whose layers were converted to eStargz. It has what is new in it:
// the layers in temporary files that have no name, and the documents in memory. The caller
// closes it.
type Converted struct {
	// Target describes the image. It is the one that was given if nothing changed.
	Target ocispec.Descriptor
	// Layers is how many layers were converted.
	Layers int

	mu        sync.Mutex
	documents map[digest.Digest][]byte
	layers    map[digest.Digest]spooled
	diffIDs   map[digest.Digest][2]digest.Digest // by the layer that was converted: its own, and the new one's
}

// Convert converts the layers that [Encrypt] would encrypt to eStargz: tar archives of
// images, compressed or not, unless they can be sealed for lazy pulling as they are. It writes
// nothing to the store. The same layers become the same bytes again, with the same version
// of pilot.
//
// Docker's media types become the OCI's, since Docker's layers have no annotations. A
// layer whose diff ID is not that of the image's configuration is an error.
func Convert(ctx context.Context, store Store, target ocispec.Descriptor, opts Options) (*Converted, error) {
	c := &Converted{
		documents: map[digest.Digest][]byte{}, layers: map[digest.Digest]spooled{}, diffIDs: map[digest.Digest][2]digest.Digest{},
	}
	w := newWork(store, opts, converting, c.layer)
	w.dry, w.strict = true, true
	w.written = func(desc ocispec.Descriptor, doc []byte) { c.documents[desc.Digest] = doc }
	w.configure = c.config
	result, err := w.run(ctx, target)
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	c.Target, c.Layers = result.Target, result.Layers
	return c, nil
}

// Has reports whether a blob is new in this image.
func (c *Converted) Has(d digest.Digest) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.documents[d] != nil || c.layers[d].File != nil
}

// HasLayer reports whether a blob is a layer that was converted. It is readable, and must
// be encrypted before it goes anywhere.
func (c *Converted) HasLayer(d digest.Digest) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.layers[d].File != nil
}

// Info returns the size of a blob that is new.
func (c *Converted) Info(_ context.Context, d digest.Digest) (content.Info, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if doc := c.documents[d]; doc != nil {
		return content.Info{Digest: d, Size: int64(len(doc))}, nil
	}
	if f := c.layers[d]; f.File != nil {
		return content.Info{Digest: d, Size: f.size}, nil
	}
	return content.Info{}, fmt.Errorf("blob %s: %w", d, errdefs.ErrNotFound)
}

// ReaderAt returns a reader of a blob that is new. A layer has to be read in order, and is
// checked against its digest.
func (c *Converted) ReaderAt(_ context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if doc := c.documents[desc.Digest]; doc != nil {
		return memory{bytes.NewReader(doc)}, nil
	}
	if f := c.layers[desc.Digest]; f.File != nil {
		return verified.New(f, desc)
	}
	return nil, fmt.Errorf("blob %s: %w", desc.Digest, errdefs.ErrNotFound)
}

// ReadRange reads len(p) bytes of a layer that is new, at that offset.
func (c *Converted) ReadRange(_ context.Context, desc ocispec.Descriptor, p []byte, off int64) error {
	c.mu.Lock()
	f := c.layers[desc.Digest]
	c.mu.Unlock()
	if f.File == nil {
		return fmt.Errorf("blob %s: %w", desc.Digest, errdefs.ErrNotFound)
	}
	_, err := f.ReadAt(p, off)
	return err
}

// Close closes the temporary files, which removes them.
func (c *Converted) Close() (err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range c.layers {
		err = errors.Join(err, f.File.Close())
	}
	clear(c.layers)
	return err
}

// spooled is a layer in a temporary file.
type spooled struct {
	*os.File
	size int64
}

func (s spooled) Size() int64 { return s.size }

// Close does nothing: see [Converted.Close].
func (s spooled) Close() error { return nil }

// isConvertible reports whether a layer can be converted. Foreign ones are what their
// publishers say.
func isConvertible(l ocispec.Descriptor) bool {
	mediaType := l.MediaType
	if oci, ok := dockerTypes[mediaType]; ok {
		mediaType = oci
	}
	switch mediaType {
	case ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd:
		return len(l.URLs) == 0
	}
	return false
}

// layer converts a layer, unless it is eStargz or zstd:chunked already and can be sealed.
func (c *Converted) layer(ctx context.Context, w *work, desc ocispec.Descriptor) (change, error) {
	if isMarked(desc) {
		if check, err := w.newLazyCheck(ctx, desc); err == nil {
			err := w.feed(ctx, desc, check)
			if broken := check.close(); err != nil || broken == nil {
				return change{none: true}, err
			}
		}
	}
	f, made, err := w.toEstargz(ctx, desc)
	if err != nil {
		return change{}, fmt.Errorf("convert to eStargz: %w", err)
	}
	out := change{desc: desc, annotations: map[string]string{tocAnnotation: made.toc.String()}}
	out.desc.MediaType, out.desc.Digest, out.desc.Size = ocispec.MediaTypeImageLayerGzip, made.digest, f.size
	c.mu.Lock()
	defer c.mu.Unlock()
	c.diffIDs[desc.Digest] = [2]digest.Digest{made.was, made.diffID}
	if c.layers[made.digest].File != nil {
		return out, f.File.Close()
	}
	c.layers[made.digest] = f
	return out, nil
}

// config returns what describes the configuration of a manifest some of whose layers were
// converted: it has their new diff IDs.
func (c *Converted) config(ctx context.Context, w *work, m ocispec.Manifest, changes map[int]change) (*ocispec.Descriptor, error) {
	doc := inlined(m.Config)
	if doc == nil {
		var err error
		if doc, err = content.ReadBlob(ctx, w.Store, m.Config); err != nil {
			return nil, err
		}
	}
	if err := jsonedit.CheckKeys(doc, []string{"rootfs"}); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	doc, err := jsonedit.Edit(doc, "rootfs", func(rootfs []byte) ([]byte, error) {
		if err := jsonedit.CheckKeys(rootfs, []string{"diff_ids"}); err != nil {
			return nil, err
		}
		return jsonedit.Edit(rootfs, "diff_ids", func(ids []byte) ([]byte, error) {
			return jsonedit.MapElements(ids, func(i int, id []byte) ([]byte, error) {
				if _, ok := changes[i]; !ok {
					return id, nil
				}
				l := m.Layers[i].Digest
				was, now := c.diffIDs[l][0], c.diffIDs[l][1]
				if got := jsonedit.Unquote(id); got != was.String() {
					return nil, fmt.Errorf("layer %s has the diff ID %s, and the configuration says %.80q: the image is damaged", l, was, got)
				}
				return jsonedit.Quote(now.String()), nil
			})
		})
	})
	if err != nil {
		return nil, err
	}
	desc := m.Config
	if oci, ok := dockerTypes[desc.MediaType]; ok {
		desc.MediaType = oci
	}
	desc.Digest, desc.Size = digest.FromBytes(doc), int64(len(doc))
	c.documents[desc.Digest] = doc
	return &desc, nil
}

// converted edits the descriptor of a layer that was converted, or of a document that has
// such layers.
func (e *edit) converted(element []byte, c change) ([]byte, error) {
	element, err := setConverted(element, c.desc)
	if err != nil || e.list != "layers" {
		return element, err
	}
	annotations, err := jsonedit.Get(element, "annotations")
	if err != nil {
		return nil, err
	}
	return setAnnotations(element, annotations, c.annotations)
}

// setConverted makes a descriptor describe something else. It loses data and URLs, where
// what it described before is.
func setConverted(element []byte, desc ocispec.Descriptor) ([]byte, error) {
	element, err := jsonedit.Remove(element, func(key string) bool { return key == "data" || key == "urls" })
	if err != nil {
		return nil, err
	}
	return setDescriptor(element, ocispec.Descriptor{}, desc)
}

// convertedDocument finishes a document of which something was converted, and returns it
// with its media type.
func (e *edit) convertedDocument(doc []byte, mediaType string) ([]byte, string, error) {
	doc, err := convert(doc, "", restore{})
	if err != nil {
		return nil, "", err
	}
	if oci, ok := dockerTypes[mediaType]; ok {
		mediaType = oci
	}
	doc, err = jsonedit.Edit(doc, "config", func(config []byte) ([]byte, error) {
		if err := unambiguous(config); err != nil {
			return nil, err
		}
		if e.config == nil {
			return convert(config, "", restore{})
		}
		return setConverted(config, *e.config)
	})
	return doc, mediaType, err
}

package archive

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/verified"
)

// manifestFile lists the images of what "docker save" wrote.
const manifestFile = "manifest.json"

// Docker is an archive that "docker save" wrote, to be read. An image in it has no
// manifest; it gets an OCI one.
type Docker struct {
	*files
	images    []savedImage
	regions   map[digest.Digest]region
	documents map[digest.Digest][]byte
}

type savedImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// OpenDocker opens an archive that "docker save" wrote. The caller closes it.
func OpenDocker(name string) (*Docker, error) {
	a, err := openFiles(name)
	if err != nil {
		return nil, err
	}
	d := &Docker{files: a, regions: map[digest.Digest]region{}, documents: map[digest.Digest][]byte{}}
	list, err := a.read(manifestFile)
	switch {
	case errdefs.IsNotFound(err):
		err = fmt.Errorf("%s is no archive of \"docker save\": it has no file manifest.json", name)
		if _, ok := a.find(ocispec.ImageLayoutFile); ok {
			err = fmt.Errorf("%w, but an OCI one: use oci-archive:%s", err, name)
		}
	case err == nil:
		if err = json.Unmarshal(list, &d.images); err != nil {
			err = fmt.Errorf("%s: manifest.json: %w", name, err)
		}
	}
	if err != nil {
		return nil, errors.Join(err, a.Close())
	}
	return d, nil
}

// Resolve returns the image with that tag, or "@" and a number counted from 0, or the
// only one if the name is empty.
func (d *Docker) Resolve(ctx context.Context, name string) (ocispec.Descriptor, error) {
	img, err := d.image(name)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s: %w", d.name, err)
	}
	desc, err := d.manifest(ctx, img)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s: %w", d.name, err)
	}
	return desc, nil
}

func (d *Docker) image(name string) (savedImage, error) {
	if number, ok := strings.CutPrefix(name, "@"); ok {
		n, err := strconv.Atoi(number)
		if err != nil || n < 0 || n >= len(d.images) {
			return savedImage{}, fmt.Errorf("it has no image %s, but %d, counted from @0: %w", name, len(d.images), errdefs.ErrNotFound)
		}
		return d.images[n], nil
	}
	var tags []string
	for _, img := range d.images {
		if name != "" && hasTag(img.RepoTags, name) {
			return img, nil
		}
		tags = append(tags, img.RepoTags...)
	}
	switch {
	case name != "":
		return savedImage{}, fmt.Errorf("it has no image %q, only %s: %w", name, strings.Join(tags, ", "), errdefs.ErrNotFound)
	case len(d.images) == 0:
		return savedImage{}, fmt.Errorf("it has no images: %w", errdefs.ErrNotFound)
	case len(d.images) > 1:
		return savedImage{}, fmt.Errorf("it has %d images: name one of %s, or @0 to @%d", len(d.images), strings.Join(tags, ", "), len(d.images)-1)
	}
	return d.images[0], nil
}

// manifest makes the manifest of an image.
func (d *Docker) manifest(ctx context.Context, img savedImage) (ocispec.Descriptor, error) {
	config, err := d.read(img.Config)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var conf ocispec.Image
	if err := json.Unmarshal(config, &conf); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s: %w", img.Config, err)
	}
	if len(conf.RootFS.DiffIDs) != len(img.Layers) {
		return ocispec.Descriptor{}, fmt.Errorf("its configuration has %d layers, and manifest.json %d", len(conf.RootFS.DiffIDs), len(img.Layers))
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: d.keep(ocispec.MediaTypeImageConfig, config), Layers: []ocispec.Descriptor{},
	}
	for i, name := range img.Layers {
		layer, err := d.layer(ctx, name, conf.RootFS.DiffIDs[i])
		if err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("layer %s: %w", name, err)
		}
		m.Layers = append(m.Layers, layer)
	}
	doc, err := json.Marshal(m)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := d.keep(ocispec.MediaTypeImageManifest, doc)
	desc.Platform = nil
	return desc, nil
}

func (d *Docker) keep(mediaType string, doc []byte) ocispec.Descriptor {
	sum := digest.FromBytes(doc)
	d.documents[sum] = doc
	return ocispec.Descriptor{MediaType: mediaType, Digest: sum, Size: int64(len(doc))}
}

// layer describes a layer. Its diff ID is its digest unless it is compressed, and is
// checked when the layer is read.
func (d *Docker) layer(ctx context.Context, name string, diffID digest.Digest) (ocispec.Descriptor, error) {
	r, ok := d.find(name)
	if !ok {
		return ocispec.Descriptor{}, fmt.Errorf("it is not in the archive: %w", errdefs.ErrNotFound)
	}
	magic := make([]byte, min(10, r.size))
	if _, err := d.archive.ReadAt(magic, r.offset); err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: diffID, Size: r.size}
	if !isTar(magic) {
		sum, err := digest.FromReader(&canceled{ctx, d.section(r)})
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		desc.Digest, desc.MediaType = sum, ocispec.MediaTypeImageLayerGzip
		if compression.DetectCompression(magic) == compression.Zstd {
			desc.MediaType = ocispec.MediaTypeImageLayerZstd
		}
	}
	if err := desc.Digest.Validate(); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("diff ID %q: %w", desc.Digest, err)
	}
	d.regions[desc.Digest] = r
	return desc, nil
}

// canceled is a reader that ends with ctx.
type canceled struct {
	ctx context.Context
	io.Reader
}

func (c *canceled) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.Reader.Read(p)
}

// Info returns the size of a blob of an image that was resolved, or
// [errdefs.ErrNotFound].
func (d *Docker) Info(_ context.Context, sum digest.Digest) (content.Info, error) {
	if doc, ok := d.documents[sum]; ok {
		return content.Info{Digest: sum, Size: int64(len(doc))}, nil
	}
	if r, ok := d.regions[sum]; ok {
		return content.Info{Digest: sum, Size: r.size}, nil
	}
	return content.Info{}, fmt.Errorf("%s has no blob %s: %w", d.name, sum, errdefs.ErrNotFound)
}

// ReaderAt returns a reader of a blob, which has to be read in order, and is checked
// against its digest before its last byte is given out.
func (d *Docker) ReaderAt(_ context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if doc, ok := d.documents[desc.Digest]; ok {
		return inMemory{bytes.NewReader(doc)}, nil
	}
	r, ok := d.regions[desc.Digest]
	if !ok {
		return nil, fmt.Errorf("%s has no blob %s: %w", d.name, desc.Digest, errdefs.ErrNotFound)
	}
	return verified.New(d.section(r), desc)
}

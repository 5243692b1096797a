// Package imagetest makes random container images for tests: nested indexes,
// several platforms, attestations and artifacts, layers of every media type that
// registries hold, with parts missing, duplicate or spelled in unusual ways.
package imagetest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is an image and everything that it refers to.
type Image struct {
	// ID names the image: [Parse] makes the same one of it.
	ID     string
	Target ocispec.Descriptor
	Blobs  map[digest.Digest]*Blob
	// Features are what is out of the ordinary, by the words of this package.
	Features map[string]bool
}

// Kind is what a blob is.
type Kind int

const (
	// Content is a layer, an attestation's statement or a part of an artifact.
	Content Kind = iota
	// Config is what a manifest names as its config.
	Config
	// Document is a manifest, an index, or an artifact's manifest.
	Document
)

// Blob is a blob that the image refers to, whether or not it is there.
type Blob struct {
	Kind      Kind
	MediaType string // that of the first reference
	Bytes     []byte
	// Marker are random bytes that occur in Bytes, and nowhere else; none in an
	// empty layer.
	Marker []byte
	// Absent blobs are not written by [Image.Write].
	Absent bool
	// Children are what a document refers to.
	Children []ocispec.Descriptor
}

// New returns the image of a seed. size bounds how many parts an image has: 1
// is a manifest with a layer or two, and 8 some dozens of manifests.
func New(seed uint64, size int) *Image {
	g := &generator{
		Rand: rand.New(rand.NewPCG(seed, uint64(size))),
		size: size,
		image: &Image{
			ID: fmt.Sprintf("%d/%d", seed, size), Blobs: make(map[digest.Digest]*Blob), Features: make(map[string]bool),
		},
		budget: 2 * size * size,
	}
	g.image.Target = g.top().descriptor()
	return g.image
}

// Parse returns the seed and the size of an image's ID.
func Parse(id string) (seed uint64, size int, err error) {
	a, b, _ := bytes.Cut([]byte(id), []byte("/"))
	if seed, err = strconv.ParseUint(string(a), 10, 64); err == nil && len(b) > 0 {
		size, err = strconv.Atoi(string(b))
	}
	return seed, size, err
}

// Digests returns those of the image's blobs of a kind, in a stable order.
func (i *Image) Digests(kind Kind) []digest.Digest {
	var list []digest.Digest
	for d, b := range i.Blobs {
		if b.Kind == kind {
			list = append(list, d)
		}
	}
	slices.Sort(list)
	return list
}

// Write writes what is not absent to a store, with the labels that keep
// containerd's garbage collector from it.
func (i *Image) Write(ctx context.Context, to content.Ingester) error {
	for d, b := range i.Blobs {
		if b.Absent {
			continue
		}
		desc := ocispec.Descriptor{MediaType: b.MediaType, Digest: d, Size: int64(len(b.Bytes))}
		labels := make(map[string]string)
		for n, child := range b.Children {
			for _, key := range images.ChildGCLabels(child) {
				if key[len(key)-1] == '.' {
					key += strconv.Itoa(n)
				}
				labels[key] = child.Digest.String()
			}
		}
		err := content.WriteBlob(ctx, to, "imagetest-"+d.String(), bytes.NewReader(b.Bytes), desc, content.WithLabels(labels))
		if err != nil && !errdefs.IsAlreadyExists(err) {
			return fmt.Errorf("write %s: %w", d, err)
		}
	}
	return nil
}

// String shows the image as a tree, for a test that failed.
func (i *Image) String() string {
	var b bytes.Buffer
	fmt.Fprintf(&b, "image %s\n", i.ID)
	i.show(&b, i.Target, "")
	return b.String()
}

func (i *Image) show(b *bytes.Buffer, desc ocispec.Descriptor, indent string) {
	blob := i.Blobs[desc.Digest]
	if blob == nil {
		return
	}
	absent := ""
	if blob.Absent {
		absent = " (absent)"
	}
	fmt.Fprintf(b, "%s%s %s %d bytes%s\n", indent, desc.MediaType, desc.Digest, len(blob.Bytes), absent)
	if blob.Kind == Document && json.Valid(blob.Bytes) {
		for _, child := range blob.Children {
			i.show(b, child, indent+"  ")
		}
	}
}

// Package claims says as what the images in containerd's content store have a blob
// unpacked: under which diff ID, and with which descriptor.
//
// Nothing of that is true by itself. A snapshot that a snapshotter makes without reading
// the layer is known by the diff IDs of the configuration, which anybody can write.
package claims

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Claim is what a manifest says of a blob.
type Claim struct {
	Namespace string
	Manifest  digest.Digest
	// Layer is the layer's descriptor in the manifest. Of its annotations it has those that
	// [Finder.Keep] selects.
	Layer ocispec.Descriptor
	// Blobs are what a snapshotter may mount as that layer: the layer's own blob, and those
	// that annotations name which containerd passes to snapshotters as labels.
	Blobs []digest.Digest
	// DiffID is what a configuration has at the layer's place, or "" if the numbers of
	// layers and of diff IDs differ, so that containerd can't unpack the image.
	DiffID digest.Digest
	// ChainID is that of the layer with those below it, after which containerd calls its
	// snapshot, or "" likewise. It is the DiffID of a first layer.
	ChainID digest.Digest
}

const (
	// configLabel is on each manifest that containerd unpacks: images.ChildGCLabels.
	configLabel = "containerd.io/gc.ref.content.config"
	// maxDocument bounds manifests and configurations, in bytes. Registries take 4 MiB.
	maxDocument = 16 << 20
	// maxKept bounds the documents whose claims are remembered, in bytes.
	maxKept = 16 << 20
)

// blobAnnotations become labels from which a snapshotter takes the digest of a blob, unless
// containerd's client sets them itself.
var blobAnnotations = []string{"containerd.io/snapshot/cri.layer-digest", "containerd.io/snapshot/remote/stargz.digest"}

// Finder reads the claims of a containerd's images. It is safe for concurrent use.
type Finder struct {
	Client *containerd.Client
	// Keep says which annotations of layers claims have. May be nil: none.
	Keep func(key string) bool
	// SkipLarge leaves images out whose manifest or configuration is too large to be read,
	// which are an error otherwise.
	SkipLarge bool

	once sync.Once
	turn chan struct{} // held while the content is listed

	began time.Time // when the listing that found began
	found []Claim
	known map[digest.Digest]document // by manifest
	size  int                        // of those, in bytes
}

// document is a manifest with its configurations.
type document struct {
	claims []Claim // without namespace
	size   int     // in bytes
}

// All returns the claims of all images of all namespaces, as they are at some time after it
// was called. The caller must not change them.
func (f *Finder) All(ctx context.Context) ([]Claim, error) {
	f.once.Do(func() { f.turn, f.known = make(chan struct{}, 1), map[digest.Digest]document{} })
	asked := time.Now()
	select {
	case f.turn <- struct{}{}:
		defer func() { <-f.turn }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if f.began.After(asked) {
		return f.found, nil // another caller's, made while this one waited
	}
	began := time.Now()
	found, err := f.list(ctx)
	if err != nil {
		return nil, err
	}
	f.began, f.found = began, found
	return found, nil
}

func (f *Finder) list(ctx context.Context) (all []Claim, err error) {
	spaces, err := f.Client.NamespaceService().List(ctx)
	if err != nil {
		return nil, err
	}
	store := f.Client.ContentStore()
	seen := map[digest.Digest]bool{}
	for _, space := range spaces {
		ctx := namespaces.WithNamespace(ctx, space)
		var manifests []content.Info
		err := store.Walk(ctx, func(info content.Info) error {
			manifests = append(manifests, info)
			return nil
		}, fmt.Sprintf("labels.%q", configLabel))
		if errdefs.IsNotFound(err) {
			continue // the namespace is gone
		}
		if err != nil {
			return nil, err
		}
		for _, info := range manifests {
			claims, err := f.of(ctx, store, info)
			if errdefs.IsNotFound(err) || f.SkipLarge && errors.Is(err, errTooLarge) {
				continue // removed meanwhile
			}
			if err != nil {
				return nil, fmt.Errorf("manifest %s in namespace %s: %w", info.Digest, space, err)
			}
			seen[info.Digest] = true
			for _, c := range claims {
				c.Namespace = space
				all = append(all, c)
			}
		}
	}
	for d, doc := range f.known {
		if !seen[d] {
			delete(f.known, d)
			f.size -= doc.size
		}
	}
	return all, nil
}

// of returns what a manifest claims.
func (f *Finder) of(ctx context.Context, store content.Store, info content.Info) ([]Claim, error) {
	if doc, ok := f.known[info.Digest]; ok {
		return doc.claims, nil
	}
	var manifest ocispec.Manifest
	size, err := read(ctx, store, ocispec.Descriptor{Digest: info.Digest}, &manifest)
	if err != nil {
		return nil, err
	}
	var layers []ocispec.Descriptor // as containerd picks them
	var configs []ocispec.Descriptor
	for _, child := range append([]ocispec.Descriptor{manifest.Config}, manifest.Layers...) {
		switch {
		case images.IsLayerType(child.MediaType):
			layers = append(layers, child)
		case images.IsConfigType(child.MediaType):
			configs = append(configs, child)
		}
	}
	complete := true
	var claims []Claim
	for _, config := range configs {
		if config.Digest.Validate() != nil {
			continue // nobody has it
		}
		var c struct { // as containerd reads it
			RootFS ocispec.RootFS `json:"rootfs"`
		}
		n, err := read(ctx, store, config, &c)
		if errdefs.IsNotFound(err) {
			complete = false // containerd reads it before it unpacks
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("configuration %s: %w", config.Digest, err)
		}
		size += n
		claims = append(claims, f.pair(info.Digest, layers, c.RootFS.DiffIDs)...)
		if len(manifest.Layers) != len(layers) {
			// Versions of containerd that do not look at media types here.
			claims = append(claims, f.pair(info.Digest, manifest.Layers, c.RootFS.DiffIDs)...)
		}
	}
	if complete && f.size+size <= maxKept {
		f.known[info.Digest] = document{claims, size}
		f.size += size
	}
	return claims, nil
}

// pair returns the claims of a manifest with those layers and diff IDs.
func (f *Finder) pair(manifest digest.Digest, layers []ocispec.Descriptor, diffIDs []digest.Digest) []Claim {
	claims := make([]Claim, 0, len(layers))
	chainIDs := identity.ChainIDs(slices.Clone(diffIDs))
	for i, l := range layers {
		c := Claim{Manifest: manifest, Blobs: []digest.Digest{l.Digest}}
		for _, key := range blobAnnotations {
			if named := l.Annotations[key]; named != "" {
				c.Blobs = append(c.Blobs, digest.Digest(named))
			}
		}
		c.Layer = ocispec.Descriptor{MediaType: l.MediaType, Digest: l.Digest, Size: l.Size, Annotations: map[string]string{}}
		for key, value := range l.Annotations {
			if f.Keep != nil && f.Keep(key) {
				c.Layer.Annotations[key] = value
			}
		}
		if len(layers) == len(diffIDs) {
			c.DiffID, c.ChainID = diffIDs[i], chainIDs[i]
		}
		claims = append(claims, c)
	}
	return claims
}

// errTooLarge is the error of a document that is not read.
var errTooLarge = errors.New("document too large")

// read reads a document and returns its size in bytes. What is not JSON of its kind is left
// as it is: containerd does not unpack it either.
func read(ctx context.Context, store content.Store, desc ocispec.Descriptor, to any) (int, error) {
	info, err := store.Info(ctx, desc.Digest)
	switch {
	case err == nil && info.Size > maxDocument:
		return 0, fmt.Errorf("%w: it has %d bytes, more than %d: remove the image", errTooLarge, info.Size, maxDocument)
	case err != nil && !(errdefs.IsNotFound(err) && desc.Data != nil):
		return 0, err
	}
	b, err := content.ReadBlob(ctx, store, desc)
	if err != nil {
		return 0, err
	}
	_ = json.Unmarshal(b, to)
	return len(b), nil
}

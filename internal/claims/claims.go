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
	Namespace string `json:"-"`
	// Manifest is the manifest's, which may have been removed: see [Finder.Preserve].
	Manifest digest.Digest `json:"manifest"`
	// Layer is the layer's descriptor in the manifest. Of its annotations it has those that
	// [Finder.Keep] selects.
	Layer ocispec.Descriptor `json:"layer"`
	// Blobs are what a snapshotter may mount as that layer: the layer's own blob, and those
	// that annotations name which containerd passes to snapshotters as labels.
	Blobs []digest.Digest `json:"blobs"`
	// DiffID is what a configuration has at the layer's place, or "" if the numbers of
	// layers and of diff IDs differ, so that containerd can't unpack the image.
	DiffID digest.Digest `json:"diffID"`
	// ChainID is that of the layer with those below it, after which containerd calls its
	// snapshot, or "" likewise. It is the DiffID of a first layer.
	ChainID digest.Digest `json:"chainID"`
	// Unread reports that the manifest or a configuration is too large to be read, so that any
	// layer may be of that image. There is no DiffID then.
	Unread bool `json:"-"`

	kept bool // it is from a document of Preserve's
}

const (
	// configLabel is on each manifest that containerd unpacks: images.ChildGCLabels.
	configLabel = "containerd.io/gc.ref.content.config"
	// maxDocument bounds manifests and configurations, in bytes. Registries take 4 MiB.
	maxDocument = 16 << 20
	// maxRemembered bounds the documents whose claims are remembered, in bytes.
	maxRemembered = 16 << 20
)

// blobAnnotations become labels from which a snapshotter takes the digest of a blob, unless
// containerd's client sets them itself.
var blobAnnotations = []string{"containerd.io/snapshot/cri.layer-digest", "containerd.io/snapshot/remote/stargz.digest"}

// Finder reads the claims of a containerd's images. It is safe for concurrent use.
type Finder struct {
	Client *containerd.Client
	// Keep says which annotations of layers claims have. May be nil: none.
	Keep func(key string) bool

	once sync.Once
	turn chan struct{} // held while the content is listed

	began time.Time // when the listing that found began
	found []Claim
	known map[digest.Digest]document // by manifest
	size  int                        // of those, in bytes
}

// document is a manifest with its configurations, or what is preserved of some.
type document struct {
	claims []Claim // without namespace
	size   int     // in bytes
}

// All returns the claims of all images of all namespaces, as they are at some time after it
// was called, and those that [Finder.Preserve] keeps. The caller must not change them.
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
		var documents []content.Info
		err := store.Walk(ctx, func(info content.Info) error {
			documents = append(documents, info)
			return nil
		}, fmt.Sprintf("labels.%q", configLabel), fmt.Sprintf("labels.%q", keptLabel))
		if errdefs.IsNotFound(err) {
			continue // the namespace is gone
		}
		if err != nil {
			return nil, err
		}
		for _, info := range documents {
			claims, err := f.of(ctx, store, info)
			isTooLarge := errors.Is(err, errTooLarge)
			switch {
			case errdefs.IsNotFound(err), isTooLarge && info.Labels[keptLabel] != "":
				continue // removed meanwhile
			case isTooLarge:
				claims = []Claim{{Manifest: info.Digest, Unread: true}}
			case err != nil:
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

// of returns what a manifest claims, or what is preserved of some.
func (f *Finder) of(ctx context.Context, store content.Store, info content.Info) ([]Claim, error) {
	if doc, ok := f.known[info.Digest]; ok {
		return doc.claims, nil
	}
	if info.Labels[keptLabel] != "" {
		return f.readKept(ctx, store, info.Digest)
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
		if errors.Is(err, errTooLarge) {
			unread := f.pair(info.Digest, manifest.Layers, nil)
			for i := range unread {
				unread[i].Unread = true
			}
			claims = append(claims, unread...)
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
	if complete {
		f.remember(info.Digest, document{claims, size})
	}
	return claims, nil
}

// remember keeps the claims of a document in memory, if there is room.
func (f *Finder) remember(d digest.Digest, doc document) {
	if f.size+doc.size <= maxRemembered {
		f.known[d] = doc
		f.size += doc.size
	}
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

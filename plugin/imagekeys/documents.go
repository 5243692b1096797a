package imagekeys

import (
	"container/list"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

const (
	// maxDocument bounds manifests and configurations, in bytes. Registries take 4 MiB.
	maxDocument = 16 << 20
	// maxRemembered bounds the documents that are remembered, in bytes as they are stored.
	maxRemembered = 16 << 20
	// maxManifests bounds the manifests and indexes of one image.
	maxManifests = 256
	// absentTTL is how long a manifest of another platform than the node's is not looked
	// for again. containerd does not run it.
	absentTTL = 30 * time.Second
)

// document is a manifest with its configurations, or an index.
type document struct {
	digest   digest.Digest
	size     int                  // in bytes, of all that was read for it
	children []ocispec.Descriptor // of an index
	isIndex  bool                 // and no manifest
	parts    []part               // of a manifest
	bases    []digest.Digest      // the first diff ID of each configuration
	chains   []digest.Digest      // the chain IDs of a manifest's configurations
}

// part is a diff ID of a configuration with the layers that a manifest has in its place.
type part struct {
	diffID digest.Digest
	// layers are those that containerd may unpack there. Versions of it differ in whether
	// they look at media types. There is none if the numbers of layers and diff IDs differ:
	// containerd can't unpack such an image, and runs it where the snapshot is there.
	layers []layer
}

type layer struct {
	desc    ocispec.Descriptor // with the annotations of encryption
	claimed []processor.Opener // nil: it is plain
}

func (l layer) encrypted() bool { return processor.IsEncrypted(l.desc.MediaType) }

// documents remembers documents by their digests, which say all of their content. It is safe
// for concurrent use.
type documents struct {
	store content.Store

	mu     sync.Mutex
	by     map[digest.Digest]*list.Element
	recent list.List // of *document, the most recent first
	size   int
	absent map[digest.Digest]time.Time
}

func (d *documents) get(id digest.Digest) *document {
	d.mu.Lock()
	defer d.mu.Unlock()
	el := d.by[id]
	if el == nil {
		return nil
	}
	d.recent.MoveToFront(el)
	return el.Value.(*document)
}

func (d *documents) put(doc *document) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.by == nil {
		d.by = map[digest.Digest]*list.Element{}
	}
	if d.by[doc.digest] != nil || doc.size > maxRemembered/4 {
		return
	}
	d.by[doc.digest] = d.recent.PushFront(doc)
	for d.size += doc.size; d.size > maxRemembered; {
		oldest := d.recent.Remove(d.recent.Back()).(*document)
		delete(d.by, oldest.digest)
		d.size -= oldest.size
	}
}

// isAbsent reports whether a manifest was not there a moment ago.
func (d *documents) isAbsent(id digest.Digest) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return time.Since(d.absent[id]) < absentTTL
}

func (d *documents) setAbsent(id digest.Digest) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.absent == nil || len(d.absent) > 4*maxManifests {
		d.absent = map[digest.Digest]time.Time{}
	}
	d.absent[id] = time.Now()
}

// manifests returns the manifests of an image that containerd may run: all that are there.
// Which of them it picks depends on its version and configuration.
func (d *documents) manifests(ctx context.Context, target ocispec.Descriptor) (found []*document, err error) {
	ours := platforms.Default()
	todo, seen := []ocispec.Descriptor{target}, map[digest.Digest]bool{}
	for len(todo) > 0 {
		next := todo[0]
		todo = todo[1:]
		if seen[next.Digest] {
			continue
		}
		if seen[next.Digest] = true; len(seen) > maxManifests {
			return nil, fmt.Errorf("image %s has more than %d manifests: %w", target.Digest, maxManifests, errdefs.ErrFailedPrecondition)
		}
		other := next.Platform != nil && !ours.Match(*next.Platform)
		if other && d.isAbsent(next.Digest) {
			continue
		}
		doc, err := d.read(ctx, next)
		if errdefs.IsNotFound(err) && next.Digest != target.Digest {
			if other {
				d.setAbsent(next.Digest)
			}
			continue // containerd fetches its own platform's alone
		}
		if err != nil {
			return nil, err
		}
		todo = append(todo, doc.children...)
		if !doc.isIndex {
			found = append(found, doc)
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("image %s: none of its manifests is there: %w", target.Digest, errdefs.ErrNotFound)
	}
	return found, nil
}

// read returns a manifest or an index. The error is errdefs.ErrNotFound if it, or a
// configuration of it, is not there.
func (d *documents) read(ctx context.Context, desc ocispec.Descriptor) (*document, error) {
	if doc := d.get(desc.Digest); doc != nil {
		return doc, nil
	}
	// The media type is what the descriptor says to containerd, and it checks that the
	// document fits it.
	var raw struct {
		Config    ocispec.Descriptor   `json:"config"`
		Layers    []ocispec.Descriptor `json:"layers"`
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	size, err := readJSON(ctx, d.store, desc, &raw)
	if err != nil {
		return nil, err
	}
	doc := &document{digest: desc.Digest, size: size}
	for _, m := range raw.Manifests {
		doc.children = append(doc.children, ocispec.Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: m.Size, Platform: m.Platform})
	}
	if doc.isIndex = raw.Config.Digest == "" && len(raw.Layers) == 0; doc.isIndex {
		d.put(doc)
		return doc, nil
	}
	configs := []ocispec.Descriptor{raw.Config}
	var layers []ocispec.Descriptor
	for _, l := range raw.Layers {
		switch {
		case images.IsLayerType(l.MediaType):
			layers = append(layers, l)
		case images.IsConfigType(l.MediaType):
			configs = append(configs, l)
		}
	}
	for i, config := range configs {
		var c struct { // as containerd reads it
			RootFS ocispec.RootFS `json:"rootfs"`
		}
		n, err := readJSON(ctx, d.store, config, &c)
		if errdefs.IsNotFound(err) && i > 0 {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("configuration %s of manifest %s: %w", config.Digest, desc.Digest, err)
		}
		doc.size += n
		if len(c.RootFS.DiffIDs) > 0 {
			doc.bases = append(doc.bases, c.RootFS.DiffIDs[0])
		}
		doc.chains = append(doc.chains, identity.ChainID(c.RootFS.DiffIDs))
		doc.add(c.RootFS.DiffIDs, layers)
		if len(layers) != len(raw.Layers) {
			doc.add(c.RootFS.DiffIDs, raw.Layers)
		}
	}
	d.put(doc)
	return doc, nil
}

// add adds the diff IDs of a configuration, with layers in their places.
func (doc *document) add(diffIDs []digest.Digest, layers []ocispec.Descriptor) {
	for i, id := range diffIDs {
		at := slices.IndexFunc(doc.parts, func(p part) bool { return p.diffID == id })
		if at < 0 {
			at = len(doc.parts)
			doc.parts = append(doc.parts, part{diffID: id})
		}
		if len(layers) == len(diffIDs) {
			doc.parts[at].layers = append(doc.parts[at].layers, newLayer(layers[i]))
		}
	}
}

func newLayer(desc ocispec.Descriptor) layer {
	l := layer{desc: ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size}}
	if l.encrypted() {
		l.desc.Annotations = desc.Annotations
		l.claimed = processor.ClaimedOpeners(desc)
	}
	return l
}

// readJSON reads a document and returns its size in bytes.
func readJSON(ctx context.Context, store content.Store, desc ocispec.Descriptor, to any) (int, error) {
	if err := desc.Digest.Validate(); err != nil {
		return 0, fmt.Errorf("digest %.80q: %w: %w", desc.Digest, err, errdefs.ErrInvalidArgument)
	}
	if desc.Size > maxDocument {
		return 0, fmt.Errorf("%s has %d bytes, more than %d: %w", desc.Digest, desc.Size, maxDocument, errdefs.ErrFailedPrecondition)
	}
	// The store's size counts, and it may be one of no bytes, which containerd can't read.
	ra, err := store.ReaderAt(ctx, ocispec.Descriptor{Digest: desc.Digest})
	if err != nil && len(desc.Data) > 0 && digest.FromBytes(desc.Data) == desc.Digest {
		return len(desc.Data), decode(desc.Data, desc, to) // as containerd does
	}
	if err != nil {
		return 0, err
	}
	defer ra.Close()
	if ra.Size() > maxDocument {
		return 0, fmt.Errorf("%s has %d bytes, more than %d: %w", desc.Digest, ra.Size(), maxDocument, errdefs.ErrFailedPrecondition)
	}
	b := make([]byte, ra.Size())
	if n, err := ra.ReadAt(b, 0); n < len(b) {
		return 0, fmt.Errorf("read %s: %w", desc.Digest, err)
	}
	return len(b), decode(b, desc, to)
}

func decode(b []byte, desc ocispec.Descriptor, to any) error {
	if err := json.Unmarshal(b, to); err != nil {
		return fmt.Errorf("%s is not the JSON of an image: %w: %w", desc.Digest, err, errdefs.ErrFailedPrecondition)
	}
	return nil
}

package plugin

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// manifestSearch finds the manifests that name a layer. It walks a namespace's
// content once for the layers of an image. It is safe for concurrent use.
type manifestSearch struct {
	store content.Store

	mu    sync.Mutex
	walks map[string]*namespaceWalk // by namespace
}

// walkTTL is how long a walk counts. What came since is found by another walk,
// made when this one does not have the layer's key.
const walkTTL = 30 * time.Second

// namespaceWalk is what a namespace's content store had.
type namespaceWalk struct {
	turn  chan struct{} // held during a walk or a read
	ended time.Time     // zero: not walked
	blobs []content.Info
	read  map[digest.Digest][]ocispec.Descriptor // the encrypted layers that a blob names
	size  int64                                  // of the blobs in read, in bytes
}

// enter returns the walk of the context's namespace, made now if there is none or if
// anew is set, and whether it was there before. The caller must call leave unless
// there is an error.
func (m *manifestSearch) enter(ctx context.Context, anew bool) (w *namespaceWalk, reused bool, err error) {
	namespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return nil, false, err
	}
	m.mu.Lock()
	w = m.walks[namespace]
	if w == nil {
		w = &namespaceWalk{turn: make(chan struct{}, 1)}
		if m.walks == nil {
			m.walks = make(map[string]*namespaceWalk)
		}
		m.walks[namespace] = w
		time.AfterFunc(walkTTL, func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			delete(m.walks, namespace)
		})
	}
	m.mu.Unlock()
	asked := time.Now()
	select {
	case w.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, false, ctx.Err()
	}
	if !w.ended.IsZero() && !anew {
		return w, true, nil
	}
	// Another may have walked while this one waited.
	if w.ended.IsZero() || w.ended.Before(asked) {
		if err := w.walk(ctx, m.store); err != nil {
			w.leave()
			return nil, false, err
		}
	}
	return w, false, nil
}

func (w *namespaceWalk) leave() { <-w.turn }

// walk lists the blobs that may be manifests.
func (w *namespaceWalk) walk(ctx context.Context, store content.Store) error {
	var blobs []content.Info
	err := store.Walk(ctx, func(info content.Info) error {
		if info.Size <= maxManifest && len(info.Labels) > 0 {
			blobs = append(blobs, info)
		}
		return ctx.Err()
	})
	if err != nil {
		return err
	}
	w.blobs, w.read, w.size, w.ended = blobs, make(map[digest.Digest][]ocispec.Descriptor), 0, time.Now()
	return nil
}

// manifestsOf returns the blobs that may be manifests of the layer, those
// first that refer to it by containerd's labels for garbage collection, then
// those that came from the same repository, each the newest first. BuildKit sets
// no labels of the first kind.
func (w *namespaceWalk) manifestsOf(layer content.Info) []content.Info {
	var referring, near []content.Info
	for _, info := range w.blobs {
		switch {
		case info.Digest == layer.Digest:
		case refersTo(info.Labels, layer.Digest):
			referring = append(referring, info)
		case sameSource(info.Labels, layer.Labels):
			near = append(near, info)
		}
	}
	newestFirst := func(a, b content.Info) int {
		return cmp.Or(b.CreatedAt.Compare(a.CreatedAt), cmp.Compare(a.Digest, b.Digest))
	}
	slices.SortFunc(referring, newestFirst)
	slices.SortFunc(near, newestFirst)
	return append(referring, near...)
}

// layersNamed returns the descriptors with which a blob names the layer, if it is a
// manifest.
func (w *namespaceWalk) layersNamed(ctx context.Context, store content.Store, blob content.Info, layer digest.Digest) ([]ocispec.Descriptor, error) {
	all, known := w.read[blob.Digest]
	if !known {
		var err error
		if all, err = encryptedLayers(ctx, store, blob); err != nil {
			return nil, err
		}
		// What is kept is at most as large as what is read for one layer.
		if w.size += blob.Size; w.size <= maxBlobBytes {
			w.read[blob.Digest] = all
		}
	}
	var named []ocispec.Descriptor
	for _, l := range all {
		if l.Digest == layer {
			named = append(named, l)
		}
	}
	return named, nil
}

func refersTo(labels map[string]string, layer digest.Digest) bool {
	for key, value := range labels {
		if strings.HasPrefix(key, gcContentLabel) && value == layer.String() {
			return true
		}
	}
	return false
}

// sameSource reports whether two blobs came from one repository. A label names
// a registry, and its value the repositories with commas between them.
func sameSource(a, b map[string]string) bool {
	for key, repositories := range a {
		if !strings.HasPrefix(key, sourceLabel) || b[key] == "" {
			continue
		}
		others := strings.Split(b[key], ",")
		for r := range strings.SplitSeq(repositories, ",") {
			if slices.Contains(others, r) {
				return true
			}
		}
	}
	return false
}

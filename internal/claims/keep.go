package claims

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// keptLabel is on content that [Finder.Preserve] has written. No image can have content
	// with labels of its choice.
	keptLabel = "com.github.ctrlplane.pilot/claims"
	// snapshotKeeps is on a snapshot, and has the digest of that content. containerd's
	// garbage collector leaves it there as long as the snapshot.
	snapshotKeeps = "containerd.io/gc.ref.content.pilot"
	// remoteLabel is on a snapshot that was not unpacked but mounted.
	remoteLabel = "containerd.io/snapshot/remote"
	// maxPreserved bounds the claims that are preserved of one snapshot.
	maxPreserved = 16
	// preserveTimeout bounds the lease of content that no snapshot names yet.
	preserveTimeout = time.Minute
)

// kept is what is preserved of a snapshot.
type kept struct {
	Claims []Claim `json:"claims"`
}

// Preserve has containerd keep what its images claim of the layers that a snapshotter has
// mounted, as long as their snapshots. Other images share those, with blobs of their own of the
// same diff ID, and containers run in them, so they are used when the image is gone for which
// they were mounted. [Finder.All] returns that then as before.
func (f *Finder) Preserve(ctx context.Context, snapshotter string) error {
	all, err := f.All(ctx)
	if err != nil {
		return err
	}
	type place struct{ namespace, chainID string }
	claimed := map[place][]Claim{}
	for _, c := range all {
		if c.ChainID != "" {
			at := place{c.Namespace, c.ChainID.String()}
			claimed[at] = append(claimed[at], c)
		}
	}
	spaces, err := f.Client.NamespaceService().List(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, space := range spaces {
		ctx := namespaces.WithNamespace(ctx, space)
		var mounted []snapshots.Info
		err := f.Client.SnapshotService(snapshotter).Walk(ctx, func(_ context.Context, info snapshots.Info) error {
			if info.Kind == snapshots.KindCommitted && info.Labels[remoteLabel] != "" {
				mounted = append(mounted, info)
			}
			return nil
		})
		if err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("snapshots of %s in namespace %s: %w", snapshotter, space, err))
		}
		for _, info := range mounted {
			blob := digest.Digest(info.Labels[snapshotters.TargetLayerDigestLabel])
			list := slices.DeleteFunc(slices.Clone(claimed[place{space, info.Name}]), func(c Claim) bool { return !slices.Contains(c.Blobs, blob) })
			if err := f.preserve(ctx, snapshotter, info, list); err != nil && !errdefs.IsNotFound(err) {
				errs = append(errs, fmt.Errorf("snapshot %s in namespace %s: %w", info.Name, space, err))
			}
		}
	}
	return errors.Join(errs...)
}

// preserve has a snapshot keep claims, unless it does, or no image has any.
func (f *Finder) preserve(ctx context.Context, snapshotter string, info snapshots.Info, list []Claim) error {
	// Those of images that are there come first.
	slices.SortStableFunc(list, func(a, b Claim) int {
		switch {
		case a.kept == b.kept:
			return 0
		case a.kept:
			return 1
		}
		return -1
	})
	if len(list) == 0 || list[0].kept {
		return nil
	}
	var doc kept
	for _, c := range list {
		if len(doc.Claims) < maxPreserved && !slices.ContainsFunc(doc.Claims, c.isSame) {
			doc.Claims = append(doc.Claims, c)
		}
	}
	b, err := json.Marshal(doc)
	if err != nil {
		return err
	}
	d := digest.FromBytes(b)
	store := f.Client.ContentStore()
	if info.Labels[snapshotKeeps] == d.String() {
		if had, err := store.Info(ctx, d); err == nil && had.Labels[keptLabel] != "" {
			return nil
		}
	}
	lease, err := f.Client.LeasesService().Create(ctx, leases.WithRandomID(), leases.WithExpiration(preserveTimeout))
	if err != nil {
		return err
	}
	defer func() { _ = f.Client.LeasesService().Delete(context.WithoutCancel(ctx), lease) }() // it expires
	ctx = leases.WithLease(ctx, lease.ID)
	if err := content.WriteBlob(ctx, store, "pilot-claims-"+d.String(), bytes.NewReader(b), ocispec.Descriptor{Digest: d, Size: int64(len(b))}); err != nil {
		return err
	}
	// It may have been there without the label, as part of an image.
	if _, err := store.Update(ctx, content.Info{Digest: d, Labels: map[string]string{keptLabel: "1"}}, "labels."+keptLabel); err != nil {
		return err
	}
	_, err = f.Client.SnapshotService(snapshotter).Update(ctx, snapshots.Info{Name: info.Name, Labels: map[string]string{snapshotKeeps: d.String()}}, "labels."+snapshotKeeps)
	return err
}

// isSame reports whether another claim says the same.
func (c Claim) isSame(o Claim) bool {
	return c.DiffID == o.DiffID && c.ChainID == o.ChainID && slices.Equal(c.Blobs, o.Blobs) &&
		c.Layer.MediaType == o.Layer.MediaType && c.Layer.Digest == o.Layer.Digest && c.Layer.Size == o.Layer.Size && maps.Equal(c.Layer.Annotations, o.Layer.Annotations)
}

// readKept returns what is preserved in a blob.
func (f *Finder) readKept(ctx context.Context, store content.Store, d digest.Digest) ([]Claim, error) {
	var doc kept
	size, err := read(ctx, store, ocispec.Descriptor{Digest: d}, &doc)
	if err != nil {
		return nil, err
	}
	for i := range doc.Claims {
		doc.Claims[i].kept = true
	}
	f.remember(d, document{doc.Claims, size})
	return doc.Claims, nil
}

package claims

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
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
	// maxPreserved bounds the claims that are preserved of one snapshot, and
	// maxPreservedSize each of them, in bytes of JSON. All of a snapshot are less than maxDocument.
	maxPreserved     = 16
	maxPreservedSize = 512 << 10
	// preserveTimeout bounds the lease of content that no snapshot names yet.
	preserveTimeout = time.Minute
	// listTimeout bounds the listing of claims.
	listTimeout = 10 * time.Second
)

// kept is what is preserved of a snapshot.
type kept struct {
	Claims []Claim `json:"claims"`
}

// mounted is a snapshot of a namespace.
type mounted struct {
	namespace string
	snapshots.Info
}

// Preserve has containerd keep what its images claim of the layers that a snapshotter has
// mounted, as long as their snapshots. Other images share those, with blobs of their own of the
// same diff ID, and containers run in them, so they are used when the image is gone for which
// they were mounted. [Finder.All] returns that then as before. Claims that used knows come first,
// if there are too many.
func (f *Finder) Preserve(ctx context.Context, snapshotter string, used func(ocispec.Descriptor) bool) error {
	// Others wait for the listing.
	listing, cancel := context.WithTimeout(ctx, listTimeout)
	all, err := f.All(listing)
	cancel()
	if err != nil {
		return err
	}
	claimed := map[string][]Claim{} // by chain ID
	for _, c := range all {
		if c.ChainID != "" {
			claimed[c.ChainID.String()] = append(claimed[c.ChainID.String()], c)
		}
	}
	spaces, err := f.Client.NamespaceService().List(ctx)
	if err != nil {
		return err
	}
	var list []mounted
	// Namespaces share what is mounted, and each has labels of its own.
	labels := map[string][]map[string]string{} // by chain ID
	var errs []error
	for _, space := range spaces {
		err := f.Client.SnapshotService(snapshotter).Walk(namespaces.WithNamespace(ctx, space), func(_ context.Context, info snapshots.Info) error {
			if info.Kind == snapshots.KindCommitted && info.Labels[remoteLabel] != "" {
				list = append(list, mounted{space, info})
				labels[info.Name] = append(labels[info.Name], info.Labels)
			}
			return nil
		})
		if err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("snapshots of %s in namespace %s: %w", snapshotter, space, err))
		}
	}
	for _, s := range list {
		claims := slices.DeleteFunc(slices.Clone(claimed[s.Name]), func(c Claim) bool {
			return !c.canBe(s.Info) || !c.kept && !slices.ContainsFunc(labels[s.Name], c.isMountedAs)
		})
		if err := f.preserve(namespaces.WithNamespace(ctx, s.namespace), snapshotter, s.Info, claims, used); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("snapshot %s in namespace %s: %w", s.Name, s.namespace, err))
		}
	}
	return errors.Join(errs...)
}

// canBe reports whether a claim may be true of a snapshot: everybody can claim a chain ID as the
// diff ID of a first layer.
func (c Claim) canBe(s snapshots.Info) bool {
	ids := []digest.Digest{c.DiffID}
	if s.Parent != "" {
		ids = []digest.Digest{digest.Digest(s.Parent), c.DiffID}
	}
	return identity.ChainID(ids).String() == s.Name
}

// isMountedAs reports whether a claim's own layer, with its table of contents, is what a snapshot
// with those labels has mounted. An annotation that names another's blob is of no use to it.
func (c Claim) isMountedAs(labels map[string]string) bool {
	if c.Layer.Digest.String() != labels[snapshotters.TargetLayerDigestLabel] {
		return false
	}
	for key, value := range c.Layer.Annotations {
		if strings.HasPrefix(key, "containerd.io/snapshot/") && labels[key] != value {
			return false
		}
	}
	return true
}

// preserve has a snapshot keep claims, unless it does, or no image has any.
func (f *Finder) preserve(ctx context.Context, snapshotter string, info snapshots.Info, list []Claim, used func(ocispec.Descriptor) bool) error {
	if !slices.ContainsFunc(list, func(c Claim) bool { return !c.kept }) {
		return nil // what is kept stays
	}
	// What nobody has used may be a tenant's, who wants the others to be left out.
	rank := func(c Claim) int {
		switch {
		case used(c.Layer):
			return 0
		case c.kept:
			return 1
		}
		return 2
	}
	slices.SortStableFunc(list, func(a, b Claim) int { return rank(a) - rank(b) })
	var doc kept
	for _, c := range list {
		if len(doc.Claims) == maxPreserved || slices.ContainsFunc(doc.Claims, c.isSame) {
			continue
		}
		if b, err := json.Marshal(c); err == nil && len(b) <= maxPreservedSize {
			doc.Claims = append(doc.Claims, c)
		}
	}
	if len(doc.Claims) == 0 {
		return nil
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

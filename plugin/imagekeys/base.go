package imagekeys

import (
	"context"
	"fmt"
	"sync"

	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// maxBases bounds the bases that are remembered.
const maxBases = 4096

// bases are first diff IDs of which it is known that no other layers are below them.
type bases struct {
	mu    sync.Mutex
	known map[digest.Digest]bool
}

// checkBases returns an error if the first diff ID of an image may be something else.
//
// containerd names the snapshot of the first layer after its diff ID, and those above it
// after their chain IDs. What a container needs is found by diff IDs, so a name of several
// layers must not pass for one of them.
func (r *Resolver) checkBases(ctx context.Context, doc *document) error {
	for _, p := range doc.parts {
		// Snapshots have other names too.
		if err := p.diffID.Validate(); err != nil {
			return fmt.Errorf("manifest %s: diff ID %.80q: %w: %w", doc.digest, p.diffID, err, errdefs.ErrFailedPrecondition)
		}
	}
	for _, d := range doc.bases {
		if err := r.checkBase(ctx, d); err != nil {
			return fmt.Errorf("manifest %s: first diff ID %s: %w", doc.digest, d, err)
		}
	}
	return nil
}

func (r *Resolver) checkBase(ctx context.Context, d digest.Digest) error {
	if r.conf.Record.IsDiffID(d) {
		return nil
	}
	r.bases.mu.Lock()
	known := r.bases.known[d]
	r.bases.mu.Unlock()
	if known {
		return nil
	}
	list, err := r.conf.Client.IntrospectionService().Plugins(ctx, "type=="+string(plugins.SnapshotPlugin))
	if err != nil {
		return err
	}
	found := false
	for _, p := range list.Plugins {
		if p.InitErr != nil {
			continue
		}
		info, err := r.conf.Client.SnapshotService(p.ID).Stat(ctx, d.String())
		switch {
		case errdefs.IsNotFound(err):
		case err != nil:
			return err
		case info.Parent != "":
			return fmt.Errorf("it is the chain ID of other layers: the image is forged: %w", errdefs.ErrFailedPrecondition)
		default:
			found = true
		}
	}
	if !found {
		// Somebody else's may come before the container has its snapshot.
		return fmt.Errorf("the image is not unpacked: pull it again: %w", errdefs.ErrFailedPrecondition)
	}
	r.bases.mu.Lock()
	defer r.bases.mu.Unlock()
	if r.bases.known == nil || len(r.bases.known) >= maxBases {
		r.bases.known = map[digest.Digest]bool{}
	}
	r.bases.known[d] = true
	return nil
}

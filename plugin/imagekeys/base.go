package imagekeys

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// checkBases returns an error if the first diff ID of an image may be something else.
//
// containerd names the snapshot of the first layer after its diff ID, and those above it
// after their chain IDs. What a container needs is found by diff IDs, so a name of several
// layers must not pass for one of them. That is looked up each time: snapshots come and go, and
// that some content has the digest proves nothing, as a chain ID is the digest of a text.
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
	names, err := r.listSnapshotters(ctx)
	if err != nil {
		return err
	}
	found := false
	var away error
	for _, name := range names {
		info, err := r.conf.Client.SnapshotService(name).Stat(ctx, d.String())
		switch {
		case errdefs.IsNotFound(err):
		case errdefs.IsUnavailable(err):
			// No container gets its files from there either.
			away = fmt.Errorf("snapshotter %s: %w", name, err)
		case err != nil:
			return err
		case info.Parent != "":
			return fmt.Errorf("it is the chain ID of other layers: the image is forged: %w", errdefs.ErrFailedPrecondition)
		default:
			found = true
		}
	}
	if !found && away != nil {
		return away
	}
	if !found && !r.conf.Record.IsDiffID(d) {
		// Somebody else's may come before the container has its snapshot.
		return fmt.Errorf("the image is not unpacked: pull it again: %w", errdefs.ErrFailedPrecondition)
	}
	return nil
}

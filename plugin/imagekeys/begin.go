package imagekeys

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/internal/claims"
	"github.com/ctrlplane/pilot/internal/layerkeys"
	"github.com/ctrlplane/pilot/processor"
)

// Begin makes sure that the record has what can be known of images that were unpacked
// without it: before there was one, or by a version of pilot that had none. Others wait for
// it, once after each start.
//
// For a new record that is what all manifests say that containerd has. Later it is only what
// was unpacked from an encrypted blob that is still there, by containerd's own label on it:
// a manifest that came since could claim that a public layer is encrypted, and keep others'
// containers from starting.
func (r *Resolver) Begin(ctx context.Context) error {
	if r.begun.Load() {
		return nil
	}
	done := r.begins.DoChan("", func() (any, error) {
		if r.begun.Load() {
			return nil, nil
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), beginTimeout)
		defer cancel()
		err := r.begin(ctx)
		if err == nil {
			r.begun.Store(true)
		}
		return nil, err
	})
	select {
	case res := <-done:
		if res.Err != nil {
			return fmt.Errorf("images that containerd had before pilot's record of layers: %w", res.Err)
		}
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

const beginTimeout = 5 * time.Minute

func (r *Resolver) begin(ctx context.Context) error {
	finder := claims.Finder{Client: r.conf.Client, Keep: func(key string) bool { return strings.HasPrefix(key, processor.AnnotationPrefix) }}
	all, err := finder.All(ctx)
	if err != nil {
		return err
	}
	isNew := !r.conf.Record.Begun()
	type claim struct {
		diffID digest.Digest
		blob   layerkeys.Blob
	}
	var found []claim
	for _, c := range all {
		if !processor.IsEncrypted(c.Layer.MediaType) || c.DiffID == "" {
			continue
		}
		if _, ok := r.conf.Record.Layer(c.DiffID); ok {
			continue
		}
		if !isNew && !r.wasUnpacked(ctx, c) {
			continue
		}
		blob := layerkeys.Blob{Digest: c.Layer.Digest, Basis: layerkeys.Claimed}
		for _, o := range processor.ClaimedOpeners(c.Layer) {
			blob.Open(o)
		}
		found = append(found, claim{c.DiffID, blob})
	}
	if len(found) > 0 {
		logrus.WithFields(logrus.Fields{"layers": len(found), "new": isNew}).Info("encrypted layers recorded that were unpacked without a record")
	}
	err = r.conf.Record.Begin(func(add func(digest.Digest, layerkeys.Blob)) {
		for _, c := range found {
			add(c.diffID, c.blob)
		}
	})
	if err != nil {
		// It is in memory, and saved as soon as that is possible. Plain images must not
		// wait for it.
		logrus.WithError(err).Warn("record of layers not saved")
	}
	return nil
}

// wasUnpacked reports whether containerd has unpacked a blob, and found that it has the diff
// ID that is claimed.
func (r *Resolver) wasUnpacked(ctx context.Context, c claims.Claim) bool {
	info, err := r.conf.Client.ContentStore().Info(namespaces.WithNamespace(ctx, c.Namespace), c.Layer.Digest)
	return err == nil && info.Labels[labels.LabelUncompressed] == c.DiffID.String()
}

const (
	saveInterval  = time.Minute
	sweepInterval = time.Hour
	// forgetAfter is how long what is recorded is kept whatever containerd has: a layer is
	// recorded before containerd has its snapshot.
	forgetAfter = 24 * time.Hour
)

// Run keeps the record until ctx is done: it begins it, saves what is not saved, also if the
// file was removed, and forgets layers that containerd has no more.
func (r *Resolver) Run(ctx context.Context) {
	tick := time.NewTicker(saveInterval)
	defer tick.Stop()
	var swept time.Time
	failed := ""
	for {
		err := r.Begin(ctx)
		if errdefs.IsUnavailable(err) {
			err = nil // containerd starts after pilot
		} else if err == nil && time.Since(swept) > sweepInterval {
			swept = time.Now()
			err = r.Sweep(ctx, time.Now().Add(-forgetAfter))
		}
		err = errors.Join(err, r.conf.Record.Save())
		if err != nil && ctx.Err() == nil && err.Error() != failed {
			logrus.WithError(err).Warn("record of layers not kept")
		}
		failed = ""
		if err != nil {
			failed = err.Error()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			if err := r.conf.Record.Flush(); err != nil {
				logrus.WithError(err).Warn("record of layers not saved")
			}
			return
		}
	}
}

// Sweep forgets what was recorded before a time of layers that containerd has no snapshot
// of, in any namespace and snapshotter.
func (r *Resolver) Sweep(ctx context.Context, before time.Time) error {
	live, n, err := r.snapshots(ctx)
	if err != nil {
		return err
	}
	if n == 0 {
		return nil // it may be another containerd, with another root, for a moment
	}
	forgotten, err := r.conf.Record.Forget(before, func(d digest.Digest) bool { return live[d] })
	if forgotten > 0 {
		logrus.WithField("layers", forgotten).Info("layers forgotten that containerd has no more")
	}
	return err
}

// chainLink is a snapshot of an unpacked layer.
type chainLink struct{ name, parent string }

// snapshots returns of which recorded diff IDs containerd has snapshots, and how many
// snapshots of layers there are. A snapshot is called after its chain ID, which is computed
// from that of its parent and the diff ID.
func (r *Resolver) snapshots(ctx context.Context) (live map[digest.Digest]bool, n int, err error) {
	links := map[chainLink]bool{}
	spaces, err := r.conf.Client.NamespaceService().List(ctx)
	if err != nil {
		return nil, 0, err
	}
	snapshotters, err := r.conf.Client.IntrospectionService().Plugins(ctx, "type=="+string(plugins.SnapshotPlugin))
	if err != nil {
		return nil, 0, err
	}
	for _, p := range snapshotters.Plugins {
		if p.InitErr != nil {
			continue
		}
		for _, space := range spaces {
			err := r.conf.Client.SnapshotService(p.ID).Walk(namespaces.WithNamespace(ctx, space), func(_ context.Context, info snapshots.Info) error {
				if info.Kind == snapshots.KindCommitted && digest.Digest(info.Name).Validate() == nil {
					links[chainLink{info.Name, info.Parent}] = true
				}
				return nil
			})
			if err != nil && !errdefs.IsNotFound(err) {
				return nil, 0, fmt.Errorf("snapshots of %s in namespace %s: %w", p.ID, space, err)
			}
		}
	}
	live = map[digest.Digest]bool{}
	known := r.conf.Record.DiffIDs()
	for link := range links {
		if err := ctx.Err(); err != nil {
			return nil, 0, err
		}
		if link.parent == "" {
			live[digest.Digest(link.name)] = true
			continue
		}
		for _, d := range known {
			if identity.ChainID([]digest.Digest{digest.Digest(link.parent), d}).String() == link.name {
				live[d] = true
				break
			}
		}
	}
	return live, len(links), nil
}

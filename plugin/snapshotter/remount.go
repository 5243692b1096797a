package snapshotter

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/containerd/stargz-snapshotter/snapshot"
	"github.com/sirupsen/logrus"
	"golang.org/x/sync/singleflight"
)

// remounter mounts layers of an earlier process again when they are needed, and has pilot
// decide about each use of a layer.
type remounter struct {
	snapshot.FileSystem
	pilot   pilot
	started atomic.Bool // the snapshotter has read what it had

	mounted sync.Map // by mount point
	mounts  singleflight.Group
}

// Mount mounts a layer, but none of those that an earlier process had while the
// snapshotter starts.
func (r *remounter) Mount(ctx context.Context, mountpoint string, labels map[string]string) error {
	if !r.started.Load() {
		return errdefs.ErrUnavailable
	}
	err := r.FileSystem.Mount(ctx, mountpoint, labels)
	if err == nil {
		r.mounted.Store(mountpoint, true)
	} else {
		go r.explain(context.WithoutCancel(ctx), mountpoint, labels, err)
	}
	return err
}

// explain logs why a layer that pilot serves could not be mounted: pilot logs those that it
// does not serve. The full pull does not wait for that.
func (r *remounter) explain(ctx context.Context, mountpoint string, labels map[string]string, err error) {
	if r.pilot.ask(ctx, labels) == nil {
		logrus.WithError(err).WithField("mountpoint", mountpoint).Warn("layer not lazy, which pilot serves: it is pulled as a whole")
	}
}

// Check checks that a layer can be used, and mounts it if it is not mounted. containerd has
// it called for each layer of each container that it creates.
//
// It asks pilot itself: the file system does not once it has all of a layer, and what other
// images claim may have changed since.
func (r *remounter) Check(ctx context.Context, mountpoint string, labels map[string]string) error {
	if err := r.pilot.ask(ctx, labels); err != nil {
		logrus.WithError(err).WithField("mountpoint", mountpoint).Warn("layer not used")
		return err
	}
	_, err, _ := r.mounts.Do(mountpoint, func() (any, error) {
		if _, mounted := r.mounted.Load(mountpoint); mounted {
			return nil, nil
		}
		// Callers that wait for it may have more time.
		return nil, r.Mount(context.WithoutCancel(ctx), mountpoint, labels)
	})
	if err != nil {
		logrus.WithError(err).WithField("mountpoint", mountpoint).Warn("layer not mounted again")
		return fmt.Errorf("mount again: %w", err)
	}
	return r.FileSystem.Check(ctx, mountpoint, labels)
}

// Unmount unmounts a layer.
func (r *remounter) Unmount(ctx context.Context, mountpoint string) error {
	r.mounted.Delete(mountpoint)
	return r.FileSystem.Unmount(ctx, mountpoint)
}

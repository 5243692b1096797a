package snapshotter

import (
	"context"
	"fmt"
	"runtime"
	"runtime/metrics"
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
	pilot     pilot
	started   atomic.Bool // the snapshotter has read what it had
	maxMemory uint64      // in bytes

	mounted sync.Map // by mount point
	mounts  singleflight.Group
}

// Mount mounts a layer, but none of those that an earlier process had while the
// snapshotter starts.
func (r *remounter) Mount(ctx context.Context, mountpoint string, labels map[string]string) error {
	if !r.started.Load() {
		return errdefs.ErrUnavailable
	}
	err := checkMemory(r.maxMemory)
	if err == nil {
		err = r.mount(ctx, mountpoint, labels)
	}
	if err != nil {
		go r.explain(context.WithoutCancel(ctx), mountpoint, labels, err)
	}
	return err
}

func (r *remounter) mount(ctx context.Context, mountpoint string, labels map[string]string) error {
	err := r.FileSystem.Mount(ctx, mountpoint, labels)
	if err == nil {
		r.mounted.Store(mountpoint, true)
	}
	return err
}

// checkMemory returns an error if this process has more memory in use than that, in bytes.
// If it took too much, the kernel would have to kill it, with all containers that read
// through it, or others in its place.
func checkMemory(most uint64) error {
	used := memory()
	if used > most {
		runtime.GC()
		used = memory()
	}
	if used > most {
		return fmt.Errorf("the snapshotter has %d MiB in memory for the layers that are mounted, more than %d MiB: %w", used>>20, most>>20, errdefs.ErrResourceExhausted)
	}
	return nil
}

// memory returns how much memory the objects of this process take, with those that the
// garbage collector has not removed yet, in bytes.
func memory() uint64 {
	sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// explain logs why a layer that pilot serves could not be mounted: pilot logs those that it
// does not serve. The full pull does not wait for that.
func (r *remounter) explain(ctx context.Context, mountpoint string, labels map[string]string, err error) {
	if r.pilot.ask(ctx, labels, false) == nil {
		logrus.WithError(err).WithField("mountpoint", mountpoint).Warn("layer not lazy, which pilot serves: it is pulled as a whole")
	}
}

// Check checks that a layer can be used, and mounts it if it is not mounted. containerd has
// it called for each layer of each container that it creates.
//
// It asks pilot itself: the file system does not once it has all of a layer, and what other
// images claim may have changed since.
func (r *remounter) Check(ctx context.Context, mountpoint string, labels map[string]string) error {
	if err := r.pilot.ask(ctx, labels, true); err != nil {
		logrus.WithError(err).WithField("mountpoint", mountpoint).Warn("layer not used")
		return err
	}
	_, err, _ := r.mounts.Do(mountpoint, func() (any, error) {
		if _, mounted := r.mounted.Load(mountpoint); mounted {
			return nil, nil
		}
		// Callers that wait for it may have more time.
		return nil, r.mount(context.WithoutCancel(ctx), mountpoint, labels)
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

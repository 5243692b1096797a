package mirror

import (
	"context"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
)

// preserveInterval is how long a layer may be mounted before what its image says of it is kept.
const preserveInterval = time.Minute

// PreserveLazy keeps what containerd's images say of the layers that the snapshotter of that
// name has mounted, until ctx is done, as long as their snapshots: when such an image is removed,
// containers of others that share them go on, and can be created.
func (m *Mirror) PreserveLazy(ctx context.Context, snapshotter string) {
	tick := time.NewTicker(preserveInterval)
	defer tick.Stop()
	failed := ""
	for {
		now := ""
		// containerd starts after pilot, and may not have the snapshotter yet.
		within, cancel := context.WithTimeout(ctx, preserveInterval)
		err := m.lazy.images.Preserve(within, snapshotter, m.lazy.has)
		cancel()
		if err != nil && ctx.Err() == nil && !errdefs.IsUnavailable(err) && !errdefs.IsInvalidArgument(err) {
			if now = err.Error(); now != failed {
				logrus.WithError(err).Warn("keys of lazily mounted layers not kept: containers that share them with an image that is removed may not start")
			}
		}
		failed = now
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// has reports whether a layer was opened by that descriptor.
func (l *lazy) has(desc ocispec.Descriptor) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	layer := l.layers[desc.Digest]
	return layer != nil && layer.isOf(desc)
}

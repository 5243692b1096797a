package install

import (
	"slices"
	"testing"
)

func TestContainersOfPilotsSnapshotterAreFoundByTheirMounts(t *testing.T) {
	const mounts = `25 1 259:1 / / rw,relatime shared:1 - ext4 /dev/root rw
410 25 0:55 / /run/containerd/io.containerd.runtime.v2.task/k8s.io/aaaa/rootfs rw,relatime shared:200 - overlay overlay rw,lowerdir=/var/lib/pilot/snapshotter/snapshotter/snapshots/2/fs:/var/lib/pilot/snapshotter/snapshotter/snapshots/1/fs,upperdir=/var/lib/pilot/snapshotter/snapshotter/snapshots/9/fs,workdir=/var/lib/pilot/snapshotter/snapshotter/snapshots/9/work
411 25 0:56 / /run/containerd/io.containerd.runtime.v2.task/default/bbbb/rootfs rw,relatime shared:201 - overlay overlay rw,lowerdir=/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/1/fs,upperdir=/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/2/fs,workdir=/w
412 25 0:57 / /var/lib/pilot/snapshotter/snapshotter/snapshots/1/fs rw,nosuid,nodev,relatime shared:202 - fuse.rawBridge stargz rw,user_id=0,group_id=0,allow_other
413 25 0:58 / /mnt/looking rw - overlay overlay rw,lowerdir=/var/lib/pilot/snapshotter/snapshotter/snapshots/2/fs,upperdir=/u,workdir=/w
`
	if got, want := lazyContainers([]byte(mounts)), []string{"/mnt/looking", "k8s.io/aaaa"}; !slices.Equal(got, want) {
		t.Errorf("%q, not %q", got, want)
	}
}

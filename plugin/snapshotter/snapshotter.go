// Package snapshotter is a snapshotter for containerd, as a proxy plugin. It mounts layers
// of encrypted eStargz images before they are pulled, and reads their decrypted parts from
// pilot's mirror when a container needs them. containerd pulls all other layers as ever,
// and unpacks them into this snapshotter.
//
// The file system, its verification and its caches are those of stargz-snapshotter. The
// daemon of that project can't do this: besides a mirror it always asks the registry,
// so anyone who may write there could put a plain layer in the place of an encrypted one.
package snapshotter

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	stargzfs "github.com/containerd/stargz-snapshotter/fs"
	fsconfig "github.com/containerd/stargz-snapshotter/fs/config"
	"github.com/containerd/stargz-snapshotter/fs/layer"
	"github.com/containerd/stargz-snapshotter/snapshot"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

// Config says where a snapshotter keeps its files, and where it reads layers.
type Config struct {
	// Root is the directory of the snapshots and caches, as an absolute path. It is
	// created with mode 0700.
	Root string
	// Lazy is the path of the unix socket at which pilot serves parts of layers.
	Lazy string
	// MaxMemory is how much memory the snapshotter may have, in bytes, before it mounts no
	// more layers, which are then pulled as a whole: of each layer that is mounted it has
	// the table of contents. Default: a quarter of the machine's.
	MaxMemory uint64
}

// New returns a snapshotter. One process at a time may use a root directory.
//
// Layers that an earlier process had mounted are mounted again when containerd next uses
// them, and not before: a registry or broker that is away keeps no other container from
// starting.
func New(ctx context.Context, conf Config) (snapshots.Snapshotter, error) {
	snapshotsDir, filesDir := filepath.Join(conf.Root, "snapshotter"), filepath.Join(conf.Root, "stargz")
	if err := os.MkdirAll(conf.Root, 0o700); err != nil {
		return nil, err
	}
	if err := overlayutils.Supported(snapshotsDir); err != nil {
		return nil, fmt.Errorf("overlayfs below %s: %w", conf.Root, err)
	}
	// The mounts of an earlier process. Where somebody has a file open, stargz-snapshotter
	// would fail to unmount them, at each start.
	if err := mount.UnmountRecursive(filepath.Join(snapshotsDir, "snapshots"), unix.MNT_DETACH); err != nil {
		return nil, err
	}
	// The caches of an earlier process, each of which has directories of its own.
	if err := discard(filesDir); err != nil {
		return nil, err
	}
	opaque := layer.OverlayOpaqueTrusted
	if userXAttr, err := overlayutils.NeedsUserXAttr(snapshotsDir); err != nil {
		return nil, err
	} else if userXAttr {
		opaque = layer.OverlayOpaqueUser
	}
	mirror := pilotAt(conf.Lazy)
	files, err := stargzfs.NewFilesystem(filesDir, settings, stargzfs.WithGetSources(mirror.sources), stargzfs.WithOverlayOpaqueType(opaque))
	if err != nil {
		return nil, err
	}
	r := &remounter{FileSystem: files, pilot: mirror, maxMemory: conf.MaxMemory}
	if r.maxMemory == 0 {
		var machine unix.Sysinfo_t
		if err := unix.Sysinfo(&machine); err != nil {
			return nil, err
		}
		r.maxMemory = uint64(machine.Totalram) * uint64(machine.Unit) / 4
	}
	// It warns of each layer that it can't mount again now.
	s, err := snapshot.NewSnapshotter(log.WithLogger(ctx, silent), snapshotsDir, r, snapshot.AsynchronousRemove, snapshot.AllowInvalidMountsOnRestart)
	r.started.Store(true)
	if err != nil {
		return nil, err
	}
	return unmarked{s}, nil
}

// discard removes a directory, and what earlier calls have not removed to the end. It does not
// wait for that: there may be a million files, and containerd waits for the snapshotter to start.
func discard(dir string) error {
	prefix := filepath.Base(dir) + ".old-"
	if err := os.Rename(dir, filepath.Join(filepath.Dir(dir), prefix+rand.Text())); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	entries, err := os.ReadDir(filepath.Dir(dir))
	if err != nil {
		return err
	}
	go func() {
		for _, e := range entries {
			if !strings.HasPrefix(e.Name(), prefix) {
				continue
			}
			path := filepath.Join(filepath.Dir(dir), e.Name())
			if err := os.RemoveAll(path); err != nil {
				logrus.WithError(err).WithField("path", path).Warn("caches of an earlier snapshotter not removed")
			}
		}
	}()
	return nil
}

// unmarked keeps callers from marking a snapshot as one that is mounted, which an image's
// annotations could have containerd do: nobody could use the layer then.
type unmarked struct{ snapshots.Snapshotter }

// Cleanup implements [snapshots.Cleaner], as stargz-snapshotter does.
func (u unmarked) Cleanup(ctx context.Context) error {
	return u.Snapshotter.(snapshots.Cleaner).Cleanup(ctx)
}

func (u unmarked) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	labels, err := u.checked(ctx, key, parent, opts)
	if err != nil {
		return nil, err
	}
	opts = append(slices.Clip(opts), unmark)
	taken, err := u.isTaken(ctx, labels[snapshots.LabelSnapshotRef], parent)
	if err != nil {
		return nil, err
	}
	if taken {
		logrus.WithFields(logrus.Fields{"digest": labels[snapshotters.TargetLayerDigestLabel], "image": labels[snapshotters.TargetRefLabel]}).
			Info("layer not lazy, as another namespace has it mounted on layers that it has unpacked: it is pulled as a whole")
		opts = append(opts, unnamed)
	}
	mounts, err := u.Snapshotter.Prepare(ctx, key, parent, opts...)
	return mounts, explained(err)
}

func (u unmarked) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	if _, err := u.checked(ctx, key, parent, opts); err != nil {
		return nil, err
	}
	mounts, err := u.Snapshotter.View(ctx, key, parent, opts...)
	return mounts, explained(err)
}

func (u unmarked) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	mounts, err := u.Snapshotter.Mounts(ctx, key)
	return mounts, explained(err)
}

// explained returns the error of a mounted layer that can't be used with what to do. Its
// reason has been logged: stargz-snapshotter does not return it.
func explained(err error) error {
	if !errdefs.IsUnavailable(err) {
		return err
	}
	return fmt.Errorf("a lazily pulled layer of the image can't be used now: \"pilot node doctor IMAGE\" on the node says why: %w", err)
}

// checkCopy returns an error if a container with a user namespace would have a layer that is
// mounted in place of the copy that containerd makes of its image. containerd looks for the copy
// by a digest of the image's chain ID and of the users, and everybody can seal that a layer has
// that as its diff ID. Image volumes are not copied.
func (u unmarked) checkCopy(ctx context.Context, key, parent string, labels map[string]string) error {
	mapped := labels[snapshots.LabelSnapshotUIDMapping] != "" || labels[snapshots.LabelSnapshotGIDMapping] != ""
	if parent == "" || !mapped || strings.Contains(key, "/image-volumes/") {
		return nil
	}
	below, err := u.Stat(ctx, parent)
	if err != nil {
		return err
	}
	if _, mounted := below.Labels[mark]; mounted {
		return fmt.Errorf("snapshot %s is mounted, and no copy of an image for a user namespace: an image was made to be taken for that: remove it: %w",
			parent, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// checked returns the labels that options give to a new snapshot, which passes checkCopy.
func (u unmarked) checked(ctx context.Context, key, parent string, opts []snapshots.Opt) (map[string]string, error) {
	var info snapshots.Info
	for _, o := range opts {
		if err := o(&info); err != nil {
			return nil, err
		}
	}
	return info.Labels, u.checkCopy(ctx, key, parent, info.Labels)
}

// isTaken reports whether a layer can't be mounted as name, which is "" for what is no layer: one
// on another snapshot has that name. Layers that are mounted have theirs in all namespaces, and
// those that are unpacked in one alone. containerd would look for the layer on parent, in vain.
func (u unmarked) isTaken(ctx context.Context, name, parent string) (bool, error) {
	if name == "" {
		return false, nil
	}
	has, err := u.Stat(ctx, name)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil && has.Parent != parent, err
}

// unnamed has a layer unpacked, and not mounted.
func unnamed(info *snapshots.Info) error {
	info.Labels = maps.Clone(info.Labels)
	delete(info.Labels, snapshots.LabelSnapshotRef)
	return nil
}

func (u unmarked) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	return u.Snapshotter.Commit(ctx, name, key, append(slices.Clip(opts), unmark)...)
}

// mark is stargz-snapshotter's label of snapshots that are mounted.
const mark = "containerd.io/snapshot/remote"

func unmark(info *snapshots.Info) error {
	info.Labels = maps.Clone(info.Labels) // others may have the same map
	delete(info.Labels, mark)
	return nil
}

// settings are those of stargz-snapshotter's file system.
var settings = fsconfig.Config{
	// Nothing is read that no container reads, except what an image has put before its
	// prefetch landmark.
	NoBackgroundFetch: true,
	NoPrometheus:      true,
	BlobConfig: fsconfig.BlobConfig{
		// The mirror decides for each mount whether the layer may be used.
		CheckAlways: true,
		// It answers with one range at a time.
		ForceSingleRangeMode: true,
	},
	DirectoryCacheConfig: fsconfig.DirectoryCacheConfig{Direct: true},
}

var silent = func() *log.Entry {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return logrus.NewEntry(l)
}()

// Serve serves a snapshotter as containerd's proxy plugins do, until ctx is done.
//
// It does not unmount layers then: containers may be using them, and their overlays keep
// what is mounted.
func Serve(ctx context.Context, s snapshots.Snapshotter, l net.Listener) error {
	server := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
		if !logrus.IsLevelEnabled(logrus.DebugLevel) {
			// It warns of each layer that is not mounted, such as those of plain images.
			// pilot logs those that should have been.
			ctx = log.WithLogger(ctx, silent)
		}
		return handle(ctx, req)
	}))
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(s))
	defer context.AfterFunc(ctx, server.Stop)()
	if err := server.Serve(l); !errors.Is(err, grpc.ErrServerStopped) { // ctx was done before it served
		return err
	}
	return nil
}

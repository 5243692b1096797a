package imagekeys

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// ImageOf returns the image that a snapshot in containerd's namespace ns was made of: one
// whose name is a container's ID, or the path where an image is mounted. said is what the
// container runtime says, which may stand for another image since, or be as short as in a
// pod's specification. If the snapshot has other layers, ImageOf returns an image that has
// them, and errdefs.ErrNotFound if there is none.
func (r *Resolver) ImageOf(ctx context.Context, ns, snapshot string, said Image) (Image, error) {
	ctx = namespaces.WithNamespace(ctx, ns)
	chain, err := r.chainOf(ctx, snapshot)
	if err != nil {
		return Image{}, err
	}
	candidates := []Image{said}
	// As CRI does.
	if named, err := reference.ParseDockerRef(said.Name); said.Digest == "" && err == nil && named.String() != said.Name {
		candidates = append(candidates, Image{Name: named.String()})
	}
	for _, c := range candidates {
		target, docs, err := r.read(ctx, c)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return Image{}, err
		}
		if hasChain(docs, chain) {
			return Image{Name: c.Name, Digest: target}, nil
		}
	}
	all, err := r.conf.Client.ImageService().List(ctx)
	if err != nil {
		return Image{}, err
	}
	for _, image := range all {
		if docs, err := r.docs.manifests(ctx, image.Target); err == nil && hasChain(docs, chain) {
			return Image{Name: image.Name, Digest: image.Target.Digest}, nil
		}
	}
	return Image{}, fmt.Errorf("image %.200q stands for other layers than the container has, and no other image has them: %w", cmp.Or(said.Name, said.Digest.String()), errdefs.ErrNotFound)
}

// chainOf returns the chain ID of the layers below a snapshot, or "".
func (r *Resolver) chainOf(ctx context.Context, snapshot string) (digest.Digest, error) {
	for {
		known := r.snapshotterNames.Load()
		snapshotters, err := r.snapshotters(ctx)
		if err != nil {
			return "", err
		}
		for _, name := range snapshotters {
			info, err := r.conf.Client.SnapshotService(name).Stat(ctx, snapshot)
			if errdefs.IsNotFound(err) && path.IsAbs(snapshot) {
				info, err = r.mounted(ctx, name, snapshot)
			}
			if err == nil {
				info.Parent, err = r.uncopied(ctx, name, info)
			}
			if err == nil {
				return digest.Digest(info.Parent), nil
			}
			if !errdefs.IsNotFound(err) {
				return "", fmt.Errorf("snapshot %s: %w", snapshot, err)
			}
		}
		if known == nil {
			return "", fmt.Errorf("snapshot %s: %w", snapshot, errdefs.ErrNotFound)
		}
		r.snapshotterNames.CompareAndSwap(known, nil) // containerd may have others since
	}
}

// uncopied returns the snapshot that a container's is made of, or of whose copy: where a
// snapshotter can't map users, containerd gives the files of an image to those of a pod with a
// user namespace in a copy, and makes the container of that.
func (r *Resolver) uncopied(ctx context.Context, snapshotter string, container snapshots.Info) (parent string, err error) {
	users, groups := container.Labels[snapshots.LabelSnapshotUIDMapping], container.Labels[snapshots.LabelSnapshotGIDMapping]
	if users == "" || groups == "" || container.Parent == "" {
		return container.Parent, nil
	}
	info, err := r.conf.Client.SnapshotService(snapshotter).Stat(ctx, container.Parent)
	if err != nil || info.Parent == "" {
		return container.Parent, err
	}
	// Its name shows that it is a copy, and no image that has one layer more.
	if name, ok := copyName(info.Parent, users, groups); ok && name == container.Parent {
		return info.Parent, nil
	}
	return container.Parent, nil
}

// copyName returns the name that containerd gives to the copy of a snapshot for users and
// groups, which are as in the labels of the container's snapshot: CONTAINER:HOST:SIZE, and
// several with commas between them.
func copyName(parent, users, groups string) (name string, ok bool) {
	var ids struct {
		Parent string `json:"Parent"`
		IDMap  struct {
			UidMap []specs.LinuxIDMapping `json:"UidMap"`
			GidMap []specs.LinuxIDMapping `json:"GidMap"`
		} `json:"IDMap"`
	}
	ids.Parent = parent
	var usersErr, groupsErr error
	ids.IDMap.UidMap, usersErr = idMap(users)
	ids.IDMap.GidMap, groupsErr = idMap(groups)
	b, err := json.Marshal(ids)
	return digest.FromBytes(b).String(), errors.Join(usersErr, groupsErr, err) == nil
}

func idMap(label string) (list []specs.LinuxIDMapping, err error) {
	for text := range strings.SplitSeq(label, ",") {
		var m specs.LinuxIDMapping
		if _, err := fmt.Sscanf(text, "%d:%d:%d", &m.ContainerID, &m.HostID, &m.Size); err != nil {
			return nil, err
		}
		list = append(list, m)
	}
	slices.SortStableFunc(list, func(a, b specs.LinuxIDMapping) int { return cmp.Compare(a.ContainerID, b.ContainerID) })
	return list, nil
}

// mounted returns the snapshot that is called after the path of an image volume. That has
// containerd's state directory as it is configured, and where it is mounted has it without
// symbolic links. What follows, …/image-volumes/SANDBOX/HEX, is the same.
func (r *Resolver) mounted(ctx context.Context, snapshotter, at string) (found snapshots.Info, err error) {
	dir, hex := path.Split(at)
	end := path.Join("/", path.Base(path.Dir(path.Dir(dir))), path.Base(dir), hex)
	err = r.conf.Client.SnapshotService(snapshotter).Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if strings.HasSuffix(info.Name, end) {
			found = info
		}
		return nil
	})
	if err == nil && found.Name == "" {
		err = errdefs.ErrNotFound
	}
	return found, err
}

// snapshotters returns containerd's snapshotters, the most used first. It remembers them.
func (r *Resolver) snapshotters(ctx context.Context) ([]string, error) {
	if names := r.snapshotterNames.Load(); names != nil {
		return *names, nil
	}
	names, err := r.listSnapshotters(ctx)
	if err == nil {
		r.snapshotterNames.Store(&names)
	}
	return names, err
}

// listSnapshotters returns those that containerd has now, the most used first.
func (r *Resolver) listSnapshotters(ctx context.Context) ([]string, error) {
	found, err := r.conf.Client.IntrospectionService().Plugins(ctx, "type=="+string(plugins.SnapshotPlugin))
	if err != nil {
		return nil, err
	}
	var names []string
	for _, p := range found.Plugins {
		if p.InitErr == nil {
			names = append(names, p.ID)
		}
	}
	slices.SortStableFunc(names, func(a, b string) int { return usual(a) - usual(b) })
	return names, nil
}

// usual is where a snapshotter is in the order of asking.
func usual(name string) int {
	switch name {
	case "pilot-lazy":
		return 0 // overlayfs is there, too, and unused
	case "overlayfs":
		return 1
	}
	return 2
}

func hasChain(docs []*document, chain digest.Digest) bool {
	return slices.ContainsFunc(docs, func(d *document) bool { return slices.Contains(d.chains, chain) })
}

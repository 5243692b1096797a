package imagekeys

import (
	"cmp"
	"context"
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

package imagekeys

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// ImageOf returns the image that a container of containerd's namespace ns was made of, whose
// snapshot has the container's ID. name is what the container runtime says, which may stand
// for another image since, or be as short as in a pod's specification. If name is of another
// image, ImageOf returns one with the same layers, and errdefs.ErrNotFound if there is none.
func (r *Resolver) ImageOf(ctx context.Context, ns, container, name string) (Image, error) {
	ctx = namespaces.WithNamespace(ctx, ns)
	chain, err := r.chainOf(ctx, container)
	if err != nil {
		return Image{}, err
	}
	names := []string{name}
	// As CRI does.
	if named, err := reference.ParseDockerRef(name); err == nil && named.String() != name {
		names = append(names, named.String())
	}
	for _, name := range names {
		target, docs, err := r.read(ctx, Image{Name: name})
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return Image{}, err
		}
		if hasChain(docs, chain) {
			return Image{Name: name, Digest: target}, nil
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
	return Image{}, fmt.Errorf("image %.200q stands for other layers than the container has, and no other image has them: %w", name, errdefs.ErrNotFound)
}

// chainOf returns the chain ID of the layers below a container's snapshot, or "".
func (r *Resolver) chainOf(ctx context.Context, container string) (digest.Digest, error) {
	snapshotters, err := r.snapshotters(ctx)
	if err != nil {
		return "", err
	}
	for _, name := range snapshotters {
		info, err := r.conf.Client.SnapshotService(name).Stat(ctx, container)
		if err == nil {
			return digest.Digest(info.Parent), nil
		}
		if !errdefs.IsNotFound(err) {
			return "", fmt.Errorf("snapshot of container %s: %w", container, err)
		}
	}
	return "", fmt.Errorf("snapshot of container %s: %w", container, errdefs.ErrNotFound)
}

// snapshotters returns containerd's snapshotters, the most used first. They are asked for
// once.
func (r *Resolver) snapshotters(ctx context.Context) ([]string, error) {
	if names := r.snapshotterNames.Load(); names != nil {
		return *names, nil
	}
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
	r.snapshotterNames.Store(&names)
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

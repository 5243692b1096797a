package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/platforms"
	"github.com/containerd/stargz-snapshotter/estargz"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// kubelet is the namespace of the kubelet's images.
const kubelet = "k8s.io"

// overlayfs is the snapshotter that pilot's takes the place of.
const overlayfs = "overlayfs"

// Change is a change of the snapshotter of the kubelet's images, from or to pilot's.
type Change struct {
	Snapshotter string // pilot's
	To          bool   // to it, not from it
}

// from returns the earlier snapshotter.
func (ch Change) from() string {
	if ch.To {
		return overlayfs
	}
	return ch.Snapshotter
}

// Image is an image of a containerd.
type Image struct{ Namespace, Name string }

// Stranded returns the images from which no container can be started after a change, or
// soon none: they lack layers, and only the earlier snapshotter keeps them unpacked. Their
// layers were pulled lazily, or removed once they were unpacked (discard_unpacked_layers).
//
// Images of other namespaces than the kubelet's are among them only if their layers were
// pulled lazily, and pilot's snapshotter was left: their clients name a snapshotter
// themselves.
func (ch Change) Stranded(ctx context.Context, c *client.Client) (list []Image, err error) {
	spaces, err := c.NamespaceService().List(ctx)
	if err != nil {
		return nil, err
	}
	loaded, err := loadedSnapshotters(ctx, c)
	if err != nil {
		return nil, err
	}
	others := slices.DeleteFunc(loaded, func(name string) bool { return name == ch.from() })
	for _, space := range spaces {
		if space != kubelet && ch.To {
			continue
		}
		ctx := namespaces.WithNamespace(ctx, space)
		all, listing := c.ListImages(ctx)
		err = errors.Join(err, listing)
		for _, i := range all {
			if lacksLayers(ctx, i, space != kubelet) && !isUnpacked(ctx, i, others) {
				list = append(list, Image{space, i.Name()})
			}
		}
	}
	return list, err
}

// loadedSnapshotters returns the snapshotters that a containerd can use.
func loadedSnapshotters(ctx context.Context, c *client.Client) (names []string, err error) {
	list, err := c.IntrospectionService().Plugins(ctx, "type=="+plugins.SnapshotPlugin.String())
	if err != nil {
		return nil, err
	}
	for _, p := range list.Plugins {
		if p.InitErr == nil {
			names = append(names, p.ID)
		}
	}
	return names, nil
}

// lacksLayers reports whether containerd does not have all layers of an image, for this
// machine's platform. With onlyLazy, one of those has to be one that can be pulled lazily.
func lacksLayers(ctx context.Context, i client.Image, onlyLazy bool) bool {
	_, _, _, missing, err := images.Check(ctx, i.ContentStore(), i.Target(), platforms.Default())
	return err == nil && slices.ContainsFunc(missing, func(layer ocispec.Descriptor) bool {
		return images.IsLayerType(layer.MediaType) &&
			(!onlyLazy || processor.IsEncrypted(layer.MediaType) && layer.Annotations[estargz.TOCJSONDigestAnnotation] != "")
	})
}

// isUnpacked reports whether one of these snapshotters keeps an image, or does not say. One
// in which a container alone keeps the image does not.
func isUnpacked(ctx context.Context, i client.Image, names []string) bool {
	config, err := i.Config(ctx)
	if err != nil {
		return true
	}
	info, err := i.ContentStore().Info(ctx, config.Digest)
	return err != nil || slices.ContainsFunc(names, func(name string) bool {
		if info.Labels[snapshotLabel+name] == "" {
			return false
		}
		unpacked, err := i.IsUnpacked(ctx, name)
		return err != nil || unpacked
	})
}

// snapshotLabel begins the labels on an image's configuration that keep its snapshots.
const snapshotLabel = "containerd.io/gc.ref.snapshot."

// ForgetImages removes images that a change has stranded from containerd, so that the
// kubelet pulls them again, and returns them. If pilot's snapshotter was left, it also has
// containerd remove all snapshots from there that no container uses.
func (ch Change) ForgetImages(ctx context.Context, c *client.Client) (removed []Image, err error) {
	list, err := ch.Stranded(ctx, c)
	for _, i := range list {
		if deleting := c.ImageService().Delete(namespaces.WithNamespace(ctx, i.Namespace), i.Name); deleting != nil {
			err = errors.Join(err, deleting)
			continue
		}
		removed = append(removed, i)
	}
	if !ch.To {
		err = errors.Join(err, ch.release(ctx, c))
	}
	return removed, err
}

// release removes what keeps the snapshots of images in pilot's snapshotter.
func (ch Change) release(ctx context.Context, c *client.Client) error {
	spaces, err := c.NamespaceService().List(ctx)
	if err != nil {
		return err
	}
	label := snapshotLabel + ch.Snapshotter
	var errs []error
	for _, space := range spaces {
		ctx := namespaces.WithNamespace(ctx, space)
		var has []content.Info
		err := c.ContentStore().Walk(ctx, func(info content.Info) error {
			has = append(has, info)
			return nil
		}, fmt.Sprintf("labels.%q", label))
		errs = append(errs, err)
		for _, info := range has {
			_, err := c.ContentStore().Update(ctx, content.Info{Digest: info.Digest, Labels: map[string]string{label: ""}}, "labels."+label)
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, collectGarbage(ctx, c))...)
}

// collectGarbage returns once containerd's garbage collector has run.
func collectGarbage(ctx context.Context, c *client.Client) error {
	ctx = namespaces.WithNamespace(ctx, kubelet)
	l, err := c.LeasesService().Create(ctx, leases.WithRandomID(), leases.WithExpiration(time.Minute))
	if err != nil {
		return err
	}
	return c.LeasesService().Delete(ctx, l, leases.SynchronousDelete)
}

// Containers returns the containers of a containerd that have a snapshotter, as
// NAMESPACE/ID, also those that have ended.
func Containers(ctx context.Context, c *client.Client, snapshotter string) (list []string, err error) {
	spaces, err := c.NamespaceService().List(ctx)
	if err != nil {
		return nil, err
	}
	for _, space := range spaces {
		all, err := c.ContainerService().List(namespaces.WithNamespace(ctx, space))
		if err != nil {
			return nil, err
		}
		for _, container := range all {
			if container.Snapshotter == snapshotter {
				list = append(list, space+"/"+container.ID)
			}
		}
	}
	return list, nil
}

// ReleaseContainers has a containerd that no longer has a snapshotter forget which snapshots
// its containers have there. It could not remove those containers otherwise.
func ReleaseContainers(ctx context.Context, c *client.Client, snapshotter string) error {
	spaces, err := c.NamespaceService().List(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, space := range spaces {
		ctx := namespaces.WithNamespace(ctx, space)
		all, err := c.ContainerService().List(ctx)
		errs = append(errs, err)
		for _, container := range all {
			if container.Snapshotter == snapshotter && container.SnapshotKey != "" {
				_, err := c.ContainerService().Update(ctx, containers.Container{ID: container.ID}, "snapshotkey")
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

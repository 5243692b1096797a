package snapshotter

import (
	"context"
	"errors"
	"slices"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/platforms"
	"github.com/containerd/stargz-snapshotter/estargz"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// ForgetImages removes the images that the snapshotter has mounted from a containerd that
// no longer has it, and returns their names. The kubelet would take them for pulled, and
// could start no container from them.
func ForgetImages(ctx context.Context, c *client.Client) (removed []string, err error) {
	spaces, err := c.NamespaceService().List(ctx)
	if err != nil {
		return nil, err
	}
	for _, space := range spaces {
		ctx := namespaces.WithNamespace(ctx, space)
		all, listing := c.ListImages(ctx)
		err = errors.Join(err, listing)
		for _, i := range all {
			if !isUnusable(ctx, i) {
				continue
			}
			if deleting := c.ImageService().Delete(ctx, i.Name()); deleting != nil {
				err = errors.Join(err, deleting)
				continue
			}
			removed = append(removed, i.Name())
		}
	}
	return removed, err
}

// isUnusable reports whether an image lacks layers that were pulled lazily, and was not
// unpacked by overlayfs, which alone this snapshotter takes the place of.
func isUnusable(ctx context.Context, i client.Image) bool {
	_, _, _, missing, err := images.Check(ctx, i.ContentStore(), i.Target(), platforms.Default())
	if err != nil || !slices.ContainsFunc(missing, func(layer ocispec.Descriptor) bool {
		return processor.IsEncrypted(layer.MediaType) && layer.Annotations[estargz.TOCJSONDigestAnnotation] != ""
	}) {
		return false
	}
	unpacked, err := i.IsUnpacked(ctx, "overlayfs")
	return err == nil && !unpacked
}

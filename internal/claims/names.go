package claims

import (
	"context"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
)

// childLabel begins the labels on an index that name its manifests.
const childLabel = "containerd.io/gc.ref.content."

// Names returns the names of the images of which a claim is: those of its manifest, and of
// indexes that have it.
func (f *Finder) Names(ctx context.Context, of Claim) (names []string, err error) {
	ctx = namespaces.WithNamespace(ctx, of.Namespace)
	images, err := f.Client.ImageService().List(ctx)
	if err != nil {
		return nil, err
	}
	for _, image := range images {
		if image.Target.Digest == of.Manifest {
			names = append(names, image.Name)
			continue
		}
		info, err := f.Client.ContentStore().Info(ctx, image.Target.Digest)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for key, child := range info.Labels {
			if strings.HasPrefix(key, childLabel) && child == of.Manifest.String() {
				names = append(names, image.Name)
				break
			}
		}
	}
	slices.Sort(names)
	return names, nil
}

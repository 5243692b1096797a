package claims

import (
	"context"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// childLabel begins the labels on an index that name its manifests.
const childLabel = "containerd.io/gc.ref.content."

// Names returns the names of a namespace's images by their manifests, those of indexes too.
func (f *Finder) Names(ctx context.Context, namespace string) (map[digest.Digest][]string, error) {
	ctx = namespaces.WithNamespace(ctx, namespace)
	images, err := f.Client.ImageService().List(ctx)
	if err != nil {
		return nil, err
	}
	names := map[digest.Digest][]string{}
	manifests := map[digest.Digest][]digest.Digest{} // by target
	for _, image := range images {
		target := image.Target.Digest
		if manifests[target] == nil {
			info, err := f.Client.ContentStore().Info(ctx, target)
			if err != nil && !errdefs.IsNotFound(err) {
				return nil, err
			}
			manifests[target] = []digest.Digest{target}
			for key, child := range info.Labels {
				if d := digest.Digest(child); strings.HasPrefix(key, childLabel) && !slices.Contains(manifests[target], d) {
					manifests[target] = append(manifests[target], d)
				}
			}
		}
		for _, d := range manifests[target] {
			names[d] = append(names[d], image.Name)
		}
	}
	return names, nil
}

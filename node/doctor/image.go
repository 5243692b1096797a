package doctor

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/processor"
)

// image examines the layers of an image of this node: each was mounted before it was
// pulled, or was pulled in full, and why.
func (e *examination) image(ctx context.Context) []Step {
	switch {
	case e.client == nil || e.broken[StepContainerd]:
		return []Step{needs(StepContainerd)}
	case !e.isLazy() || e.running.Lazy == containerd.LazyEnding:
		return []Step{failed("this node does not pull lazily", "pilot node install --lazy --now")}
	}
	ctx, img, err := e.findImage(ctx)
	if err != nil {
		return []Step{failed(said(err), "ctr --namespace k8s.io images list -q")}
	}
	manifest, err := images.Manifest(ctx, e.client.ContentStore(), img.Target(), platforms.Default())
	if err != nil {
		return []Step{failed(said(err), "ctr --namespace k8s.io images check")}
	}
	diffIDs, err := img.RootFS(ctx)
	if err != nil {
		return []Step{failed(said(err), "ctr --namespace k8s.io images check")}
	}
	if len(diffIDs) != len(manifest.Layers) {
		return []Step{failed(fmt.Sprintf("%s has %d layers, and its configuration %d", img.Name(), len(manifest.Layers), len(diffIDs)))}
	}
	var steps []Step
	for n, layer := range manifest.Layers {
		chain := identity.ChainID(diffIDs[:n+1]).String()
		info, err := e.client.SnapshotService(containerd.LazySnapshotter).Stat(ctx, chain)
		_, mounted := info.Labels[remoteLabel]
		switch {
		case err != nil && !errdefs.IsNotFound(err):
			return append(steps, failed(said(err), startSnapshotter...))
		case mounted:
			steps = append(steps, passed(fmt.Sprintf("layer %s is mounted, and was not pulled", layer.Digest)))
			continue
		}
		state := "was pulled in full"
		if err != nil {
			state = "is not unpacked into " + containerd.LazySnapshotter
		}
		why, fix := e.notLazy(ctx, img.Name(), layer)
		steps = append(steps, Step{Result: Warning, Detail: fmt.Sprintf("layer %s %s: %s", layer.Digest, state, why), Fix: fix})
	}
	return steps
}

// findImage returns the image with the name that was asked for, from the first namespace
// that has it, the kubelet's first, and a context with that namespace.
func (e *examination) findImage(ctx context.Context) (context.Context, client.Image, error) {
	all, err := e.client.NamespaceService().List(ctx)
	if err != nil {
		return nil, nil, err
	}
	for _, namespace := range append([]string{"k8s.io"}, all...) {
		ctx := namespaces.WithNamespace(ctx, namespace)
		img, err := e.client.ImageService().Get(ctx, e.Image)
		if err == nil {
			return ctx, client.NewImageWithPlatform(e.client, img, platforms.Default()), nil
		}
		if !errdefs.IsNotFound(err) {
			return nil, nil, err
		}
	}
	return nil, nil, fmt.Errorf("containerd has no image %q: give its whole name, as in docker.io/library/busybox:1", e.Image)
}

// notLazy returns why a layer of an image can't be pulled lazily, or was not.
func (e *examination) notLazy(ctx context.Context, name string, layer ocispec.Descriptor) (why string, fix []string) {
	again := []string{"ctr-pilot images encrypt --estargz", "push it, and pull it again"}
	switch {
	case !processor.IsEncrypted(layer.MediaType):
		return "it is not encrypted", nil
	case layer.Annotations[estargz.TOCJSONDigestAnnotation] == "":
		return "it is not eStargz", again
	case e.Lazy == "":
		return "lazy-listen is off in " + e.Configuration, reinstall
	}
	ref, err := reference.Parse(name)
	if err != nil {
		return said(err), nil
	}
	why, err = refused(ctx, e.Lazy, ref.Hostname(), strings.TrimPrefix(ref.Locator, ref.Hostname()+"/"), layer.Digest)
	switch {
	case err != nil:
		return err.Error(), startPilot
	case why == "":
		return "pilot serves its parts now, so it was pulled before lazy pulling worked", []string{"remove the image, and pull it again"}
	}
	return "pilot says: " + why, nil
}

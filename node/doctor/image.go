package doctor

import (
	"context"
	"fmt"
	"net/url"
	"strings"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
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
			steps = append(steps, e.mounted(ctx, layer.Digest, chain))
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

// mounted asks pilot whether a mounted layer may be used now, as the snapshotter does for each
// container: by the labels of its snapshot, which may be those of another image.
func (e *examination) mounted(ctx context.Context, layer digest.Digest, chain string) Step {
	is := fmt.Sprintf("layer %s is mounted", layer)
	no := is + ", and no container of it starts: "
	if e.Lazy == "" {
		return failed(no+"lazy-listen is off in "+e.Configuration, reinstall...)
	}
	conn, err := dial("unix://" + e.LazySnapshotter)
	if err != nil {
		return failed(err.Error(), startSnapshotter...)
	}
	defer conn.Close()
	resp, err := snapshotsapi.NewSnapshotsClient(conn).Stat(ctx, &snapshotsapi.StatSnapshotRequest{Snapshotter: containerd.LazySnapshotter, Key: chain})
	if err != nil {
		return failed(no+said(err), startSnapshotter...)
	}
	labels := resp.GetInfo().GetLabels()
	ref, err := reference.Parse(labels[snapshotters.TargetRefLabel])
	if err != nil {
		return failed(no + said(err))
	}
	why, err := refused(ctx, e.Lazy, ref.Hostname(), strings.TrimPrefix(ref.Locator, ref.Hostname()+"/"), digest.Digest(labels[snapshotters.TargetLayerDigestLabel]), url.Values{
		"toc": {labels[estargz.TOCJSONDigestAnnotation]}, "snapshot": {labels[snapshots.LabelSnapshotRef]}, "for": {"container"},
	})
	switch {
	case err != nil:
		return failed(no+err.Error(), startPilot...)
	case why != "":
		return failed(fmt.Sprintf("%spilot says of %s: %s", no, ref.Locator, why))
	}
	return passed(is + ", and was not pulled")
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
	why, err = refused(ctx, e.Lazy, ref.Hostname(), strings.TrimPrefix(ref.Locator, ref.Hostname()+"/"), layer.Digest, nil)
	switch {
	case err != nil:
		return err.Error(), startPilot
	case why == "":
		return "pilot serves its parts now, so it was pulled before lazy pulling worked", []string{"remove the image, and pull it again"}
	}
	return "pilot says: " + why, nil
}

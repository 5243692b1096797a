package bench

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/processor"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
	"github.com/ctrlplane/pilot/processor/ocicryptclient/grpcdial"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// BenchmarkMemory has containerd unpack four layers of 1 GiB at once, and reports
// pilot's peak memory.
func BenchmarkMemory(b *testing.B) {
	dir := harness.TempDir(b) // on disk: it is 8 GiB
	_, brokerURL := harness.StartBroker(b, dir+"/broker", "team-a")
	process, conf := harness.StartPilot(b, dir, brokerURL)
	providers, err := ocicryptclient.FromFile(conf, grpcdial.Call)
	if err != nil {
		b.Fatal(err)
	}
	to := processor.Recipients{Keys: processor.Keys{Providers: providers}, Parameters: map[string][][]byte{"pilot": {[]byte("team-a")}}}
	n := harness.NewDifferNode(b, dir, harness.DifferConfig{Containerd: harness.Containerd2()})
	client, err := containerd.New(n.Socket)
	if err != nil {
		b.Fatal(err)
	}
	defer client.Close()
	ctx, release, err := client.WithLease(namespaces.WithNamespace(b.Context(), "default"))
	if err != nil {
		b.Fatal(err)
	}
	defer release(ctx)

	const layers, size = 4, 1 << 30
	var descs [layers]ocispec.Descriptor
	var g errgroup.Group
	for i := range descs {
		g.Go(func() (err error) {
			descs[i], err = storeEncrypted(ctx, client.ContentStore(), fmt.Sprintf("layer%d", i), size, to)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		b.Fatal(err)
	}
	snapshots := client.SnapshotService("overlayfs")
	for i, desc := range descs {
		g.Go(func() error {
			mounts, err := snapshots.Prepare(ctx, fmt.Sprintf("extract-%d", i), "")
			if err != nil {
				return err
			}
			_, err = client.DiffService().Apply(ctx, desc, mounts)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		b.Fatal(err)
	}
	peak := float64(process.Peak(b)) / 1e6
	for i := range descs {
		if err := snapshots.Remove(ctx, fmt.Sprintf("extract-%d", i)); err != nil {
			b.Error(err)
		}
	}
	measure(b, comparison{"memory of pilot serve, four layers of 1 GiB at once", "target: 64 MiB", "MB", "≤ 1"}, (64<<20)/1e6, func() float64 { return peak })
}

// storeEncrypted writes an encrypted layer with one file of size bytes into a
// content store.
func storeEncrypted(ctx context.Context, store content.Store, name string, size int64, to processor.Recipients) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer + "+encrypted"}
	key := processor.NewLayerKey("")
	var err error
	desc.Annotations, err = key.Wrap(ctx, to, nil)
	if err != nil {
		return desc, err
	}
	r, w := io.Pipe()
	go func() {
		tw := tar.NewWriter(w)
		err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: size})
		for block := make([]byte, 1<<20); err == nil && size > 0; size -= int64(len(block)) {
			_, err = tw.Write(block)
		}
		if err == nil {
			err = tw.Close()
		}
		w.CloseWithError(err)
	}()
	encrypter, err := processor.NewEncrypter(r, key)
	if err != nil {
		return desc, err
	}
	cw, err := content.OpenWriter(ctx, store, content.WithRef(name))
	if err != nil {
		return desc, err
	}
	defer cw.Close()
	if desc.Size, err = io.CopyBuffer(struct{ io.Writer }{cw}, struct{ io.Reader }{encrypter}, make([]byte, 1<<20)); err != nil {
		return desc, err
	}
	desc.Digest = cw.Digest()
	if err := cw.Commit(ctx, desc.Size, desc.Digest); err != nil {
		return desc, err
	}
	option, value, err := key.PublicOptions()
	desc.Annotations[option] = value
	return desc, err
}

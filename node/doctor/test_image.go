package doctor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/platforms"
	"github.com/containerd/stargz-snapshotter/estargz"
	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/processor"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
	"github.com/ctrlplane/pilot/processor/ocicryptclient/grpcdial"
)

const (
	testRepository = "pilot-doctor"
	// remoteLabel is what stargz-snapshotter gives to snapshots that it mounts.
	remoteLabel = "containerd.io/snapshot/remote"
)

// testImage is a small encrypted image that can be pulled lazily, in a registry of its own.
type testImage struct {
	target ocispec.Descriptor // its manifest
	layer  ocispec.Descriptor
	diffID digest.Digest
	secret []byte // what is in testFile
	blobs  map[digest.Digest][]byte
}

// newTestImage makes an image that is encrypted for a KEK, and leaves its parts in store.
func newTestImage(ctx context.Context, store content.Store, provider, target, kek string) (*testImage, error) {
	secret := newSecret()
	archive, err := tarOf(file{testFile, secret})
	if err != nil {
		return nil, err
	}
	chunked, err := estargz.Build(io.NewSectionReader(bytes.NewReader(archive), 0, int64(len(archive))))
	if err != nil {
		return nil, err
	}
	defer chunked.Close()
	blob, err := io.ReadAll(chunked)
	if err != nil {
		return nil, err
	}
	i := &testImage{diffID: chunked.DiffID(), secret: secret, blobs: map[digest.Digest][]byte{}}
	add := func(mediaType string, b []byte) (ocispec.Descriptor, error) {
		desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
		return desc, content.WriteBlob(ctx, store, "pilot-doctor-"+desc.Digest.String(), bytes.NewReader(b), desc)
	}
	addJSON := func(mediaType string, v any) (ocispec.Descriptor, error) {
		b, err := json.Marshal(v)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		return add(mediaType, b)
	}
	layer, err := add(ocispec.MediaTypeImageLayerGzip, blob)
	if err != nil {
		return nil, err
	}
	layer.Annotations = map[string]string{estargz.TOCJSONDigestAnnotation: chunked.TOCDigest().String()}
	conf, err := addJSON(ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: platforms.DefaultSpec(),
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{i.diffID}},
	})
	if err != nil {
		return nil, err
	}
	plain, err := addJSON(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: conf, Layers: []ocispec.Descriptor{layer},
	})
	if err != nil {
		return nil, err
	}
	wrapper, err := ocicryptclient.New(provider, keyproviderconfig.KeyProviderAttrs{Grpc: target}, grpcdial.Call)
	if err != nil {
		return nil, err
	}
	result, err := image.Encrypt(ctx, store, plain, processor.Recipients{
		Keys:       processor.Keys{Providers: map[string]processor.KeyProvider{provider: wrapper}},
		Parameters: map[string][][]byte{provider: {[]byte(kek)}},
	}, image.Options{})
	if err != nil {
		return nil, err
	}
	i.target = result.Target
	manifest, err := content.ReadBlob(ctx, store, i.target)
	if err != nil {
		return nil, err
	}
	var encrypted ocispec.Manifest
	if err := json.Unmarshal(manifest, &encrypted); err != nil {
		return nil, err
	}
	i.layer = encrypted.Layers[0]
	i.blobs[i.target.Digest] = manifest
	for _, desc := range []ocispec.Descriptor{encrypted.Config, i.layer} {
		if i.blobs[desc.Digest], err = content.ReadBlob(ctx, store, desc); err != nil {
			return nil, err
		}
	}
	return i, nil
}

// ServeHTTP is a registry with the image.
func (i *testImage) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	name := path.Base(r.URL.Path)
	if !strings.Contains(name, ":") {
		name = i.target.Digest.String() // any tag, and the check for a registry
	}
	b, found := i.blobs[digest.Digest(name)]
	if !found {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	if digest.Digest(name) == i.target.Digest {
		w.Header().Set("Content-Type", i.target.MediaType)
	}
	w.Header().Set("Docker-Content-Digest", name)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
}

// pullLazily pulls an image from a registry of its own, and reads its file. If it was not
// pulled lazily, why says what pilot has against it.
func (e *examination) pullLazily(ctx context.Context) (why string, err error) {
	i, err := newTestImage(ctx, e.client.ContentStore(), e.ProviderNames[0], e.Listen, e.kek)
	if err != nil {
		return "", err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	registry := &http.Server{Handler: i, ReadHeaderTimeout: 5 * time.Second}
	go func() { _ = registry.Serve(l) }()
	defer registry.Close()
	ref := l.Addr().String() + "/" + testRepository + ":" + string(i.secret)
	pulled, err := e.client.Pull(ctx, ref,
		client.WithResolver(docker.NewResolver(docker.ResolverOptions{Hosts: docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost))})),
		client.WithPlatform(platforms.DefaultString()), client.WithPullUnpack, client.WithPullSnapshotter(containerd.LazySnapshotter),
		client.WithImageHandlerWrapper(snapshotters.AppendInfoHandlerWrapper(ref)))
	if err != nil {
		return "", err
	}
	defer func() {
		err = errors.Join(err, e.client.ImageService().Delete(context.WithoutCancel(ctx), pulled.Name(), images.SynchronousDelete()))
	}()
	snapshots := e.client.SnapshotService(containerd.LazySnapshotter)
	chain := identity.ChainID([]digest.Digest{i.diffID}).String()
	info, err := snapshots.Stat(ctx, chain)
	if err != nil {
		return "", err
	}
	if _, mounted := info.Labels[remoteLabel]; !mounted {
		why, err := refused(ctx, e.Lazy, l.Addr().String(), testRepository, i.layer.Digest, nil)
		if err == nil && why == "" {
			why = "pilot serves its parts, and the snapshotter did not mount it"
		}
		return why, err
	}
	mounts, err := snapshots.View(ctx, "pilot-doctor-"+string(i.secret), chain)
	if err != nil {
		return "", fmt.Errorf("snapshotter %s: %w", containerd.LazySnapshotter, err)
	}
	return "", mount.WithReadonlyTempMount(ctx, mounts, func(root string) error {
		b, err := os.ReadFile(filepath.Join(root, testFile))
		if err == nil && !bytes.Equal(b, i.secret) {
			err = errors.New("the file in the mounted layer is not the one that was encrypted")
		}
		return err
	})
}

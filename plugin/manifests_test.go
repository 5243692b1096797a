package plugin

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"github.com/ctrlplane/pilot/processor"
)

// builder is a containerd's content store with an encrypted layer in it, whose
// descriptor has no annotations, as BuildKit hands it to a differ.
type builder struct {
	content.Store
	t      testing.TB
	ctx    context.Context
	keys   keys
	unwrap processor.Keys // of the differ
	plain  []byte
	layer  ocispec.Descriptor // with annotations
	bare   ocispec.Descriptor // without
}

var fromApp = map[string]string{"containerd.io/distribution.source.registry.example.com": "other,app"}

func newBuilder(t testing.TB) *builder {
	t.Helper()
	dir := t.TempDir()
	blobs, err := local.NewStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	db, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	db.NoSync = true
	t.Cleanup(func() { db.Close() })
	b := &builder{
		Store: metadata.NewDB(db, blobs, nil).ContentStore(), t: t, ctx: namespaces.WithNamespace(t.Context(), "buildkit"),
		keys: newKeys(t), plain: tarball(t, 1000),
	}
	b.layer = b.encrypted(b.plain)
	b.bare = b.layer
	b.bare.Annotations = nil
	return b
}

// encrypted writes an encrypted layer that came from the repository app.
func (b *builder) encrypted(plain []byte) ocispec.Descriptor {
	b.t.Helper()
	var ciphertext bytes.Buffer
	desc, err := processor.Encrypt(b.t.Context(), &ciphertext, bytes.NewReader(plain), layerType, b.keys.to)
	if err != nil {
		b.t.Fatal(err)
	}
	b.put(b.ctx, ciphertext.Bytes(), fromApp)
	return desc
}

func (b *builder) put(ctx context.Context, blob []byte, labels map[string]string) {
	b.t.Helper()
	desc := ocispec.Descriptor{Digest: digest.FromBytes(blob), Size: int64(len(blob))}
	if err := content.WriteBlob(ctx, b, desc.Digest.String(), bytes.NewReader(blob), desc, content.WithLabels(labels)); err != nil {
		b.t.Fatal(err)
	}
}

// manifest writes a manifest of layers.
func (b *builder) manifest(ctx context.Context, labels map[string]string, layers ...ocispec.Descriptor) {
	b.t.Helper()
	doc, err := json.Marshal(ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Layers: layers})
	if err != nil {
		b.t.Fatal(err)
	}
	b.put(ctx, doc, labels)
}

// named returns the layer with the annotations of another.
func (b *builder) named(like ocispec.Descriptor, add map[string]string) ocispec.Descriptor {
	l := b.layer
	l.Annotations = maps.Clone(like.Annotations)
	maps.Copy(l.Annotations, add)
	return l
}

// apply unpacks the layer that has no annotations.
func (b *builder) apply() error {
	b.t.Helper()
	mounts, dir := overlay(b.t)
	d := New(b, nil, Config{DecryptionKeysPath: b.keys.dir, Keys: b.unwrap, UnwrapTimeout: 30 * time.Second})
	applied, err := d.Apply(b.ctx, b.bare, mounts)
	if err != nil {
		return err
	}
	if file, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || len(file) != 1000 || applied.Digest != digest.FromBytes(b.plain) {
		b.t.Errorf("unpacked: %+v, %d bytes, %v", applied, len(file), err)
	}
	return nil
}

func (b *builder) refuses(want ...string) {
	b.t.Helper()
	err := b.apply()
	if !errdefs.IsFailedPrecondition(err) {
		b.t.Errorf("want a failed precondition: %v", err)
	}
	for _, w := range want {
		if err != nil && !strings.Contains(err.Error(), w) {
			b.t.Errorf("want %q in: %v", w, err)
		}
	}
}

const annotationKeysJWE = "org.opencontainers.image.enc.keys.jwe"

func TestKeysFromManifests(t *testing.T) {
	for name, labels := range map[string]func(layer digest.Digest) map[string]string{
		"same repository": func(digest.Digest) map[string]string { return fromApp },
		"one of its repositories": func(digest.Digest) map[string]string {
			return map[string]string{"containerd.io/distribution.source.registry.example.com": "app"}
		},
		"garbage collector's label": func(d digest.Digest) map[string]string {
			return map[string]string{"containerd.io/gc.ref.content.l.0": d.String()}
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBuilder(t)
			b.put(b.ctx, []byte(`{"layers": "`+b.layer.Digest.String()+`"}`), fromApp) // is no manifest
			b.manifest(b.ctx, fromApp, b.bare)
			b.manifest(b.ctx, labels(b.layer.Digest), b.encrypted([]byte("another")), b.layer)
			if err := b.apply(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestKeysInNoManifest(t *testing.T) {
	b := newBuilder(t)
	b.refuses("the layer's descriptor has no key annotations, and no manifest in namespace buildkit names the layer")

	// Those of other tenants and of other repositories are none of ours.
	b.manifest(namespaces.WithNamespace(t.Context(), "other"), fromApp, b.layer)
	b.manifest(b.ctx, map[string]string{"containerd.io/distribution.source.registry.example.com": "app2"}, b.layer)
	b.manifest(b.ctx, nil, b.named(b.layer, map[string]string{"x": "1"}))
	b.refuses("no manifest in namespace buildkit names the layer")

	b.manifest(b.ctx, fromApp, b.bare)
	b.refuses("neither the layer's descriptor nor a manifest in namespace buildkit has its key", "encrypt --keys-from BASE")
}

// countingProvider unwraps nothing and counts how often it is asked.
type countingProvider struct{ asked atomic.Int32 }

func (*countingProvider) WrapKey(context.Context, [][]byte, []byte) ([]byte, error) { return nil, nil }

func (p *countingProvider) UnwrapKey(context.Context, [][]byte, []byte) ([]byte, error) {
	p.asked.Add(1)
	return nil, fmt.Errorf("no KEK for you")
}

// TestHostileManifests has others name the layer, too.
func TestHostileManifests(t *testing.T) {
	b := newBuilder(t)
	provider := &countingProvider{}
	counting := processor.Keys{Providers: map[string]processor.KeyProvider{"counting": provider}}
	b.unwrap = counting
	many := make([]string, 4096)
	for i := range many {
		many[i] = base64.StdEncoding.EncodeToString(fmt.Appendf(nil, "recipient %d", i))
	}
	const countingKeys = "org.opencontainers.image.enc.keys.provider.counting"
	other := b.encrypted([]byte("another layer, whose key unwraps just as well"))
	onlyCounting := b.named(b.layer, map[string]string{countingKeys: strings.Join(many, ",")})
	delete(onlyCounting.Annotations, annotationKeysJWE)

	b.manifest(b.ctx, fromApp, onlyCounting)
	b.refuses("no KEK for you")
	if n := provider.asked.Swap(0); n > 64 {
		t.Errorf("the key provider was asked %d times for one descriptor", n)
	}

	// The right one is the oldest, so it comes last.
	hostile := func() {
		b.manifest(b.ctx, fromApp, b.named(other, nil), b.bare)
		b.manifest(b.ctx, fromApp, b.named(other, map[string]string{countingKeys: strings.Join(many, ",")}))
		b.manifest(b.ctx, fromApp, b.named(b.layer, map[string]string{"org.opencontainers.image.enc.pubopts": other.Annotations["org.opencontainers.image.enc.pubopts"]}))
		b.manifest(b.ctx, fromApp, b.named(b.layer, map[string]string{annotationKeysJWE: "%%%"}))
	}
	hostile()
	b.refuses("its key is not that of this layer")
	provider.asked.Store(0)

	b = newBuilder(t)
	b.unwrap = counting
	other = b.encrypted([]byte("another layer, whose key unwraps just as well"))
	b.manifest(b.ctx, fromApp, b.layer)
	hostile()
	b.manifest(b.ctx, map[string]string{"containerd.io/gc.ref.content.l.0": b.layer.Digest.String()}, b.named(other, map[string]string{countingKeys: "AAAA"}))
	if err := b.apply(); err != nil {
		t.Error(err)
	}
	if n := provider.asked.Load(); n > 256 {
		t.Errorf("the key provider was asked %d times", n)
	}
}

// TestManyManifests bounds the search.
func TestManyManifests(t *testing.T) {
	b := newBuilder(t)
	b.manifest(b.ctx, fromApp, b.layer)
	for i := range maxBlobs {
		b.put(b.ctx, fmt.Appendf(nil, `{"layers": [], "n": %d}`, i), fromApp)
	}
	b.refuses("no manifest in namespace buildkit names the layer")

	b = newBuilder(t)
	for i := range 2 * maxVerified {
		other := b.encrypted(fmt.Appendf(nil, "layer %d", i))
		b.manifest(b.ctx, fromApp, b.named(other, nil))
	}
	b.refuses("more than 16 keys that are not its own")
}

// BenchmarkKeysOfManyLayers finds the keys of an image of 40 layers in a namespace
// of 2,000 small blobs from its repository.
func BenchmarkKeysOfManyLayers(b *testing.B) {
	s := newBuilder(b)
	for i := range 2000 {
		s.put(s.ctx, fmt.Appendf(nil, `{"layers": [], "n": %d}`, i), fromApp)
	}
	layers := s.manyLayers(40)
	for b.Loop() {
		d := New(s, nil, Config{DecryptionKeysPath: s.keys.dir, UnwrapTimeout: time.Minute})
		for _, l := range layers {
			key, err := d.layerKey(s.ctx, processor.Keys{}, l)
			if err != nil {
				b.Fatal(err)
			}
			key.Clear()
		}
	}
}

// manyLayers writes an image of n layers, and returns them without annotations.
func (b *builder) manyLayers(n int) (bare []ocispec.Descriptor) {
	var layers []ocispec.Descriptor
	for i := range n {
		layers = append(layers, b.encrypted(fmt.Appendf(nil, "layer %d", i)))
	}
	b.manifest(b.ctx, fromApp, layers...)
	for _, l := range layers {
		l.Annotations = nil
		bare = append(bare, l)
	}
	return bare
}

// countingStore counts how often a content store is walked.
type countingStore struct {
	content.Store
	walks atomic.Int32
	hangs bool // until the caller gives up
}

func (s *countingStore) Walk(ctx context.Context, fn content.WalkFunc, filters ...string) error {
	s.walks.Add(1)
	if s.hangs {
		<-ctx.Done()
		return ctx.Err()
	}
	return s.Store.Walk(ctx, fn, filters...)
}

// TestManifestsAreWalkedOnce unpacks an image of many layers, and another that comes
// after it.
func TestManifestsAreWalkedOnce(t *testing.T) {
	b := newBuilder(t)
	store := &countingStore{Store: b}
	d := New(store, nil, Config{DecryptionKeysPath: b.keys.dir, Keys: b.unwrap, UnwrapTimeout: 30 * time.Second})
	unwrap := func(want int32, layers ...ocispec.Descriptor) {
		t.Helper()
		var all sync.WaitGroup
		for _, l := range layers {
			all.Go(func() {
				key, err := d.layerKey(b.ctx, processor.Keys{}, l)
				if err != nil {
					t.Error(err)
					return
				}
				key.Clear()
			})
		}
		all.Wait()
		if n := store.walks.Swap(0); n != want {
			t.Errorf("the namespace was walked %d times for %d layers, not %d", n, len(layers), want)
		}
	}
	first := b.manyLayers(40)
	unwrap(1, first...)

	// A manifest that came since is found: where there was none, and where there
	// was one with the key of another layer.
	second := b.encrypted([]byte("of a second image"))
	b.manifest(b.ctx, fromApp, second)
	second.Annotations = nil
	unwrap(1, second)
	third, other := b.encrypted([]byte("of a third image")), b.encrypted([]byte("another"))
	wrong := third
	wrong.Annotations = other.Annotations
	b.manifest(b.ctx, fromApp, wrong)
	b.manifest(b.ctx, fromApp, b.encrypted([]byte("so that there are two")), third)
	third.Annotations = nil
	unwrap(1, third)
	unwrap(0, first[0], second, third)

	// Another namespace has a walk of its own.
	elsewhere := namespaces.WithNamespace(t.Context(), "elsewhere")
	if _, err := d.layerKey(elsewhere, processor.Keys{}, second); err == nil || store.walks.Load() != 1 {
		t.Errorf("in another namespace: %d walks, %v", store.walks.Load(), err)
	}
}

// TestManifestSearchEnds has a content store not answer in time.
func TestManifestSearchEnds(t *testing.T) {
	b := newBuilder(t)
	b.manifest(b.ctx, fromApp, b.layer)
	store := &countingStore{Store: b, hangs: true}
	mounts, _ := overlay(t)
	d := New(store, nil, Config{DecryptionKeysPath: b.keys.dir, UnwrapTimeout: 50 * time.Millisecond})
	if _, err := d.Apply(b.ctx, b.bare, mounts); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "search for the layer's key in the namespace's manifests") {
		t.Errorf("want unavailable: %v", err)
	}
	store.hangs = false
	d.conf.UnwrapTimeout = 30 * time.Second
	if _, err := d.Apply(b.ctx, b.bare, mounts); err != nil {
		t.Errorf("once it answers: %v", err)
	}
}

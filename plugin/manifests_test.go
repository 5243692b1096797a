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
	t     *testing.T
	ctx   context.Context
	keys  keys
	plain []byte
	layer ocispec.Descriptor // with annotations
	bare  ocispec.Descriptor // without
}

var fromApp = map[string]string{"containerd.io/distribution.source.registry.example.com": "other,app"}

func newBuilder(t *testing.T) *builder {
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
	ciphertext, desc, err := processor.EncryptLayer(b.t.Context(), plain, layerType, b.keys.ec)
	if err != nil {
		b.t.Fatal(err)
	}
	b.put(b.ctx, ciphertext, fromApp)
	desc.Digest, desc.Size = digest.FromBytes(ciphertext), int64(len(ciphertext))
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
	return b.applyWith(b.differ())
}

func (b *builder) differ() *Differ {
	return New(b, nil, Config{DecryptionKeysPath: b.keys.dir, UnwrapTimeout: 30 * time.Second})
}

func (b *builder) applyWith(d *Differ) error {
	b.t.Helper()
	mounts, dir := overlay(b.t)
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

// TestKeysOfCollectedManifest has containerd collect the manifest after the first
// layer of the image was unpacked.
func TestKeysOfCollectedManifest(t *testing.T) {
	b := newBuilder(t)
	second := b.encrypted(b.plain)
	b.manifest(b.ctx, fromApp, b.layer, second)
	d := b.differ()
	if err := b.applyWith(d); err != nil {
		t.Fatal(err)
	}
	err := b.Walk(b.ctx, func(info content.Info) error {
		if info.Digest != b.layer.Digest && info.Digest != second.Digest {
			return b.Delete(b.ctx, info.Digest)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, layer := range []ocispec.Descriptor{second, b.layer} {
		b.bare.Digest, b.bare.Size = layer.Digest, layer.Size
		if err := b.applyWith(d); err != nil {
			t.Error(err)
		}
		b.refuses("no manifest in namespace buildkit names the layer") // by another differ
	}
	tenant := *b
	tenant.ctx = namespaces.WithNamespace(t.Context(), "other")
	ciphertext, err := content.ReadBlob(b.ctx, b, b.bare)
	if err != nil {
		t.Fatal(err)
	}
	tenant.put(tenant.ctx, ciphertext, fromApp)
	if err := tenant.applyWith(d); err == nil || !strings.Contains(err.Error(), "no manifest in namespace other names the layer") {
		t.Errorf("in another namespace: %v", err)
	}
	// An image that lost the key on the way does not get it from memory.
	b.manifest(b.ctx, fromApp, b.bare)
	if err := b.applyWith(d); err == nil || !strings.Contains(err.Error(), "encrypt --keys-from BASE") {
		t.Errorf("with a manifest without the key: %v", err)
	}
}

// TestSiblingsAreBounded remembers more than there is room for.
func TestSiblingsAreBounded(t *testing.T) {
	var s siblings
	for i := range 20 {
		l := ocispec.Descriptor{Digest: digest.FromString(fmt.Sprint(i)), Annotations: map[string]string{annotationKeysJWE: strings.Repeat("x", maxSiblingBytes/8)}}
		s.add("buildkit", l)
		if s.bytes > maxSiblingBytes || len(s.layers) > 8 {
			t.Fatalf("%d layers of %d bytes", len(s.layers), s.bytes)
		}
		if found := s.of("buildkit", ocispec.Descriptor{Digest: l.Digest}); len(found) != 1 || found[0].Annotations[annotationKeysJWE] != l.Annotations[annotationKeysJWE] {
			t.Errorf("of the last one: %d", len(found))
		}
	}
}

// countingProvider unwraps nothing and counts how often it is asked.
type countingProvider struct{ asked atomic.Int32 }

func (*countingProvider) WrapKey(context.Context, []byte) ([]byte, error) { return nil, nil }

func (p *countingProvider) UnwrapKey(context.Context, []byte) ([]byte, error) {
	p.asked.Add(1)
	return nil, fmt.Errorf("no KEK for you")
}

// TestHostileManifests has others name the layer, too.
func TestHostileManifests(t *testing.T) {
	b := newBuilder(t)
	provider := &countingProvider{}
	processor.RegisterKeyProvider("counting", provider)
	many := make([]string, 4096)
	for i := range many {
		many[i] = base64.StdEncoding.EncodeToString(fmt.Appendf(nil, "recipient %d", i))
	}
	const counting = "org.opencontainers.image.enc.keys.provider.counting"
	other := b.encrypted([]byte("another layer, whose key unwraps just as well"))
	onlyCounting := b.named(b.layer, map[string]string{counting: strings.Join(many, ",")})
	delete(onlyCounting.Annotations, annotationKeysJWE)

	b.manifest(b.ctx, fromApp, onlyCounting)
	b.refuses("no KEK for you")
	if n := provider.asked.Swap(0); n > 64 {
		t.Errorf("the key provider was asked %d times for one descriptor", n)
	}

	// The right one is the oldest, so it comes last.
	hostile := func() {
		b.manifest(b.ctx, fromApp, b.named(other, nil), b.bare)
		b.manifest(b.ctx, fromApp, b.named(other, map[string]string{counting: strings.Join(many, ",")}))
		b.manifest(b.ctx, fromApp, b.named(b.layer, map[string]string{"org.opencontainers.image.enc.pubopts": other.Annotations["org.opencontainers.image.enc.pubopts"]}))
		b.manifest(b.ctx, fromApp, b.named(b.layer, map[string]string{annotationKeysJWE: "%%%"}))
	}
	hostile()
	b.refuses("its key is not that of this layer")
	provider.asked.Store(0)

	b = newBuilder(t)
	other = b.encrypted([]byte("another layer, whose key unwraps just as well"))
	b.manifest(b.ctx, fromApp, b.layer)
	hostile()
	b.manifest(b.ctx, map[string]string{"containerd.io/gc.ref.content.l.0": b.layer.Digest.String()}, b.named(other, map[string]string{counting: "AAAA"}))
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

package harness

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Object is JSON in the making.
type Object = map[string]any

// Layout is an OCI image layout, or a Docker image in the same form, in memory.
type Layout struct {
	t     testing.TB
	Files map[string][]byte // by their name in the layout
}

func NewLayout(t testing.TB) *Layout {
	return &Layout{t, map[string][]byte{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`)}}
}

// Blob adds a blob and returns its descriptor.
func (l *Layout) Blob(mediaType string, b []byte) Object {
	d := digest.FromBytes(b)
	l.Files["blobs/sha256/"+d.Encoded()] = b
	return Object{"mediaType": mediaType, "digest": d.String(), "size": len(b)}
}

func (l *Layout) JSON(mediaType string, v any) Object {
	b, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		l.t.Fatal(err)
	}
	return l.Blob(mediaType, b)
}

// LayerKind is a kind of layer.
type LayerKind struct {
	Name     string // another for each way to compress
	Compress func(io.Writer) io.WriteCloser
	OCI      string
	Docker   string
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

var LayerKinds = []LayerKind{
	{"tar", func(w io.Writer) io.WriteCloser { return nopCloser{w} }, "application/vnd.oci.image.layer.v1.tar", "application/vnd.docker.image.rootfs.diff.tar"},
	{"gzip", func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) }, "application/vnd.oci.image.layer.v1.tar+gzip", "application/vnd.docker.image.rootfs.diff.tar.gzip"},
	{"zstd", func(w io.Writer) io.WriteCloser { z, _ := zstd.NewWriter(w); return z }, "application/vnd.oci.image.layer.v1.tar+zstd", "application/vnd.docker.image.rootfs.diff.tar.zstd"},
}

// Layer adds a layer of files and returns its descriptor and its diff ID.
func (l *Layout) Layer(k LayerKind, mediaType string, files map[string][]byte) (Object, string) {
	var plain bytes.Buffer
	tw := tar.NewWriter(&plain)
	for name, b := range files {
		if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(b))}); err != nil {
			l.t.Fatal(err)
		}
		tw.Write(b)
	}
	tw.Close()
	id := digest.FromBytes(plain.Bytes())
	return l.Blob(mediaType, k.pack(plain.Bytes(), id)), id.String()
}

// packed are layers by their kind and diff ID: nearly all images have the same program.
var packed sync.Map

// pack returns a layer in its compressed form.
func (k LayerKind) pack(plain []byte, id digest.Digest) []byte {
	if k.Name == "tar" {
		return plain
	}
	key := k.Name + " " + id.String()
	b, ok := packed.Load(key)
	if !ok {
		var out bytes.Buffer
		w := k.Compress(&out)
		w.Write(plain)
		w.Close()
		b, _ = packed.LoadOrStore(key, out.Bytes())
	}
	return bytes.Clone(b.([]byte))
}

// Manifest adds the manifest of an image of layers with these diff IDs, and its
// configuration, and returns its descriptor.
func (l *Layout) Manifest(layers []Object, diffIDs []string) Object {
	config := l.JSON("application/vnd.oci.image.config.v1+json", Object{"architecture": Arch, "os": "linux", "rootfs": Object{"type": "layers", "diff_ids": diffIDs}})
	return l.JSON("application/vnd.oci.image.manifest.v1+json", Object{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": layers})
}

// Image adds an image with two layers, a program and the secret that it
// prints, and returns its manifest's descriptor.
func (l *Layout) Image(k LayerKind, docker bool, arch, secret string) Object {
	hello, err := os.ReadFile(filepath.Join(Bin, "hello"))
	if err != nil {
		l.t.Fatal(err)
	}
	manifestType, configType, layerType := "application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.config.v1+json", k.OCI
	if docker {
		manifestType, configType, layerType = "application/vnd.docker.distribution.manifest.v2+json", "application/vnd.docker.container.image.v1+json", k.Docker
	}
	program, programID := l.Layer(k, layerType, map[string][]byte{"hello": hello})
	data, dataID := l.Layer(k, layerType, map[string][]byte{"secret": []byte(secret)})
	config := l.JSON(configType, Object{
		"architecture": arch, "os": "linux", "config": Object{"Cmd": []string{"/hello"}},
		"rootfs": Object{"type": "layers", "diff_ids": []string{programID, dataID}},
	})
	manifest := Object{"schemaVersion": 2, "mediaType": manifestType, "config": config, "layers": []Object{program, data}}
	if !docker {
		data["annotations"] = Object{"com.example.layer": "kept"}
		manifest["annotations"] = Object{"com.example.manifest": "kept"}
		manifest["x-unknown"] = []int{1, 2, 3}
	}
	desc := l.JSON(manifestType, manifest)
	desc["platform"] = Object{"architecture": arch, "os": "linux"}
	return desc
}

// Index adds an index of images for two platforms, and of a BuildKit
// attestation for one of them.
func (l *Layout) Index(k LayerKind, secret string) Object {
	ours := l.Image(k, false, runtime.GOARCH, secret)
	other := l.Image(k, false, "s390x", secret)
	statement := l.Blob("application/vnd.in-toto+json", []byte(`{"_type":"https://in-toto.io/Statement/v0.1"}`))
	attestation := l.JSON("application/vnd.oci.image.manifest.v1+json", Object{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": l.JSON("application/vnd.oci.image.config.v1+json", Object{"architecture": "unknown", "os": "unknown", "rootfs": Object{"type": "layers", "diff_ids": []string{statement["digest"].(string)}}}),
		"layers": []Object{statement},
	})
	attestation["platform"] = Object{"architecture": "unknown", "os": "unknown"}
	attestation["annotations"] = Object{"vnd.docker.reference.digest": ours["digest"], "vnd.docker.reference.type": "attestation-manifest"}
	return l.JSON("application/vnd.oci.image.index.v1+json", Object{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
		"manifests": []Object{ours, other, attestation}, "annotations": Object{"com.example.index": "kept"},
	})
}

// Tar writes the layout with an image under a name, for images import, and
// returns the file.
func (l *Layout) Tar(file, name string, target Object) string {
	target["annotations"] = Object{"io.containerd.image.name": name}
	l.Files["index.json"], _ = json.Marshal(Object{"schemaVersion": 2, "manifests": []Object{target}})
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for name, content := range l.Files {
		if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content))}); err != nil {
			l.t.Fatal(err)
		}
		tw.Write(content)
	}
	tw.Close()
	return Write(l.t, file, b.String())
}

// NewSecret returns text that is found nowhere else.
func NewSecret() string {
	b := make([]byte, 16)
	rand.Read(b)
	return fmt.Sprintf("the secret is %x", b)
}

const Arch = runtime.GOARCH

// ImageOf adds an image of these layers, packed, and returns its manifest's
// descriptor.
func (l *Layout) ImageOf(k LayerKind, layers [][]byte) Object {
	l.t.Helper()
	var descs []Object
	var ids []string
	for _, b := range layers {
		var packed bytes.Buffer
		w := k.Compress(&packed)
		if _, err := w.Write(b); err != nil {
			l.t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			l.t.Fatal(err)
		}
		descs = append(descs, l.Blob(k.OCI, packed.Bytes()))
		ids = append(ids, digest.FromBytes(b).String())
	}
	return l.Manifest(descs, ids)
}

func Zstd(t testing.TB, b []byte, options ...zstd.EOption) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := zstd.NewWriter(&out, options...)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(b) // a stream, which does not say how long it is
	w.Close()
	return out.Bytes()
}

// WriteTo writes the layout's blobs into a content store.
func (l *Layout) WriteTo(ctx context.Context, store content.Store, o Object) ocispec.Descriptor {
	l.t.Helper()
	for name, b := range l.Files {
		if hex := filepath.Base(name); strings.HasPrefix(name, "blobs/") {
			desc := ocispec.Descriptor{Digest: digest.NewDigestFromEncoded(digest.SHA256, hex), Size: int64(len(b))}
			if err := content.WriteBlob(ctx, store, hex, strings.NewReader(string(b)), desc); err != nil {
				l.t.Fatal(err)
			}
		}
	}
	text, err := json.Marshal(o)
	if err != nil {
		l.t.Fatal(err)
	}
	var desc ocispec.Descriptor
	if err := json.Unmarshal(text, &desc); err != nil {
		l.t.Fatal(err)
	}
	return desc
}

// Write writes an image as an OCI layout.
func (l *Layout) Write(dir, tag string, target Object) {
	target["annotations"] = Object{"org.opencontainers.image.ref.name": tag}
	target = Object{"schemaVersion": 2, "manifests": []Object{target}}
	for name, b := range l.Files {
		Write(l.t, filepath.Join(dir, name), string(b))
	}
	l.JSON("", target)
	for _, b := range l.Files {
		if strings.Contains(string(b), `"org.opencontainers.image.ref.name"`) {
			Write(l.t, filepath.Join(dir, "index.json"), string(b))
		}
	}
}

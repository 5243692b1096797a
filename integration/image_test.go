package integration

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// object is JSON in the making.
type object = map[string]any

// layout is an OCI image layout, or a Docker image in the same form, in memory.
type layout struct {
	t     testing.TB
	files map[string][]byte // by their name in the layout
}

func newLayout(t testing.TB) *layout {
	return &layout{t, map[string][]byte{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`)}}
}

// blob adds a blob and returns its descriptor.
func (l *layout) blob(mediaType string, b []byte) object {
	d := digest.FromBytes(b)
	l.files["blobs/sha256/"+d.Encoded()] = b
	return object{"mediaType": mediaType, "digest": d.String(), "size": len(b)}
}

func (l *layout) json(mediaType string, v any) object {
	b, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		l.t.Fatal(err)
	}
	return l.blob(mediaType, b)
}

// kind is a kind of layer.
type kind struct {
	name     string
	compress func(io.Writer) io.WriteCloser
	oci      string
	docker   string
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

var kinds = []kind{
	{"tar", func(w io.Writer) io.WriteCloser { return nopCloser{w} }, "application/vnd.oci.image.layer.v1.tar", "application/vnd.docker.image.rootfs.diff.tar"},
	{"gzip", func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) }, "application/vnd.oci.image.layer.v1.tar+gzip", "application/vnd.docker.image.rootfs.diff.tar.gzip"},
	{"zstd", func(w io.Writer) io.WriteCloser { z, _ := zstd.NewWriter(w); return z }, "application/vnd.oci.image.layer.v1.tar+zstd", "application/vnd.docker.image.rootfs.diff.tar.zstd"},
}

// layer adds a layer of files and returns its descriptor and its diff ID.
func (l *layout) layer(k kind, mediaType string, files map[string][]byte) (object, string) {
	var plain, packed bytes.Buffer
	tw := tar.NewWriter(&plain)
	for name, b := range files {
		if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(b))}); err != nil {
			l.t.Fatal(err)
		}
		tw.Write(b)
	}
	tw.Close()
	w := k.compress(&packed)
	w.Write(plain.Bytes())
	w.Close()
	return l.blob(mediaType, packed.Bytes()), digest.FromBytes(plain.Bytes()).String()
}

// packed adds a layer that is a tar file, and returns its descriptor and diff ID.
func (l *layout) packed(mediaType string, b []byte) (object, string) {
	return l.blob(mediaType, b), digest.FromBytes(b).String()
}

// manifest adds the manifest of an image of layers with these diff IDs, and its
// configuration, and returns its descriptor.
func (l *layout) manifest(layers []object, diffIDs []string) object {
	config := l.json("application/vnd.oci.image.config.v1+json", object{"architecture": goarch, "os": "linux", "rootfs": object{"type": "layers", "diff_ids": diffIDs}})
	return l.json("application/vnd.oci.image.manifest.v1+json", object{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": layers})
}

// image adds an image with two layers, a program and the secret that it
// prints, and returns its manifest's descriptor.
func (l *layout) image(k kind, docker bool, arch, secret string) object {
	hello, err := os.ReadFile(filepath.Join(bin, "hello"))
	if err != nil {
		l.t.Fatal(err)
	}
	manifestType, configType, layerType := "application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.config.v1+json", k.oci
	if docker {
		manifestType, configType, layerType = "application/vnd.docker.distribution.manifest.v2+json", "application/vnd.docker.container.image.v1+json", k.docker
	}
	program, programID := l.layer(k, layerType, map[string][]byte{"hello": hello})
	data, dataID := l.layer(k, layerType, map[string][]byte{"secret": []byte(secret)})
	config := l.json(configType, object{
		"architecture": arch, "os": "linux", "config": object{"Cmd": []string{"/hello"}},
		"rootfs": object{"type": "layers", "diff_ids": []string{programID, dataID}},
	})
	manifest := object{"schemaVersion": 2, "mediaType": manifestType, "config": config, "layers": []object{program, data}}
	if !docker {
		data["annotations"] = object{"com.example.layer": "kept"}
		manifest["annotations"] = object{"com.example.manifest": "kept"}
		manifest["x-unknown"] = []int{1, 2, 3}
	}
	desc := l.json(manifestType, manifest)
	desc["platform"] = object{"architecture": arch, "os": "linux"}
	return desc
}

// index adds an index of images for two platforms, and of a BuildKit
// attestation for one of them.
func (l *layout) index(k kind, secret string) object {
	ours := l.image(k, false, runtime.GOARCH, secret)
	other := l.image(k, false, "s390x", secret)
	statement := l.blob("application/vnd.in-toto+json", []byte(`{"_type":"https://in-toto.io/Statement/v0.1"}`))
	attestation := l.json("application/vnd.oci.image.manifest.v1+json", object{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": l.json("application/vnd.oci.image.config.v1+json", object{"architecture": "unknown", "os": "unknown", "rootfs": object{"type": "layers", "diff_ids": []string{statement["digest"].(string)}}}),
		"layers": []object{statement},
	})
	attestation["platform"] = object{"architecture": "unknown", "os": "unknown"}
	attestation["annotations"] = object{"vnd.docker.reference.digest": ours["digest"], "vnd.docker.reference.type": "attestation-manifest"}
	return l.json("application/vnd.oci.image.index.v1+json", object{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
		"manifests": []object{ours, other, attestation}, "annotations": object{"com.example.index": "kept"},
	})
}

// tar writes the layout with an image under a name, for images import, and
// returns the file.
func (l *layout) tar(file, name string, target object) string {
	target["annotations"] = object{"io.containerd.image.name": name}
	l.files["index.json"], _ = json.Marshal(object{"schemaVersion": 2, "manifests": []object{target}})
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for name, content := range l.files {
		if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content))}); err != nil {
			l.t.Fatal(err)
		}
		tw.Write(content)
	}
	tw.Close()
	return write(l.t, file, b.String())
}

// newSecret returns text that is found nowhere else.
func newSecret() string {
	b := make([]byte, 16)
	rand.Read(b)
	return fmt.Sprintf("the secret is %x", b)
}

// contains reports whether a file below dir has text in it, as it is.
func contains(t testing.TB, dir, text string) bool {
	t.Helper()
	found := false
	err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() {
			b, readErr := os.ReadFile(path)
			found, err = found || strings.Contains(string(b), text), readErr
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

const goarch = runtime.GOARCH

// keyPair makes a private key in a directory of its own, and its public key.
func keyPair(t testing.TB, dir string) (private, public string) {
	t.Helper()
	private, public = filepath.Join(dir, "private", "key.pem"), filepath.Join(dir, "public.pem")
	if err := os.MkdirAll(filepath.Dir(private), 0o700); err != nil {
		t.Fatal(err)
	}
	output(t, command(t, "openssl", "genrsa", "-out", private, "2048"))
	output(t, command(t, "openssl", "rsa", "-in", private, "-pubout", "-out", public))
	return private, public
}

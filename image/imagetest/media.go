package imagetest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/hex"
	"fmt"

	"github.com/klauspost/compress/zstd"
)

// Media types of layers and of what else stands in a manifest's list of layers.
const (
	tarLayer    = "application/vnd.oci.image.layer.v1.tar"
	gzipLayer   = tarLayer + "+gzip"
	zstdLayer   = tarLayer + "+zstd"
	dockerTar   = "application/vnd.docker.image.rootfs.diff.tar"
	dockerGzip  = dockerTar + ".gzip"
	dockerZstd  = dockerTar + ".zstd"
	foreignTar  = "application/vnd.docker.image.rootfs.foreign.diff.tar"
	foreignGzip = foreignTar + ".gzip"
	restricted  = "application/vnd.oci.image.layer.nondistributable.v1.tar"
	inToto      = "application/vnd.in-toto+json"
	wasm        = "application/vnd.wasm.content.layer.v1+wasm"
)

// ordinary are the types of layers that every tool knows.
var ordinary = []string{tarLayer, gzipLayer, gzipLayer, gzipLayer, zstdLayer}

// dockers are the types of layers in Docker's manifests.
var dockers = []string{dockerTar, dockerGzip, dockerGzip, dockerZstd}

// foreigns are those that are fetched from elsewhere, by their URLs.
var foreigns = []string{foreignTar, foreignGzip, restricted, restricted + "+gzip", restricted + "+zstd"}

// unusual are the types of other formats, and of unusual spelling.
var unusual = []string{
	tarLayer + "+bzip2", tarLayer + "+xz", dockerTar + ".bzip2", "application/x-xz",
	"application/vnd.erofs.layer.v1", "application/vnd.oci.image.layer.v1.erofs",
	"application/vnd.oci.image.layer.nydus.blob.v1", "application/vnd.sylabs.sif.layer.v1.sif", wasm,
	"application/vnd.oci.image.layer.v1.tar+GZIP", "Application/vnd.oci.image.layer.v1.tar+gzip", gzipLayer + "; charset=binary", gzipLayer + " ",
	"application/vnd.docker.image.rootfs.diff.tar+gzip", "application/vnd.oci.image.layer.v1.tar.gzip", "application/x-tar", "application/gzip", "", "text/plain",
}

// artifacts are the types of the parts of artifacts, by that of their config.
var artifacts = map[string][]string{
	"application/vnd.cncf.helm.config.v1+json":  {"application/vnd.cncf.helm.chart.content.v1.tar+gzip", "application/vnd.cncf.helm.chart.provenance.v1.prov"},
	"application/vnd.cncf.model.config.v1+json": {"application/vnd.cncf.model.weight.v1.tar", "application/vnd.cncf.model.weight.v1.raw", "application/vnd.cncf.model.weight.config.v1.tar", "application/vnd.cncf.model.doc.v1.tar"},
	"application/vnd.oci.empty.v1+json":         {"application/spdx+json", "application/vnd.cyclonedx+json", inToto, "application/vnd.dev.sigstore.bundle.v0.3+json", "text/plain"},
	"application/vnd.wasm.config.v0+json":       {wasm, "application/wasm"},
}

const markerSize = 32

// marker returns random bytes; what they are in is found again by them.
func (g *generator) marker() []byte {
	b := make([]byte, markerSize)
	for i := range b {
		b[i] = byte(g.Uint32())
	}
	return b
}

// length is how much random content a blob has, in bytes: mostly little, and now
// and then about as much as is read and written at once.
func (g *generator) length() int {
	switch {
	case g.chance(0.01):
		return 1<<20 - 700 + g.IntN(1400)
	case g.chance(0.1):
		return 0
	}
	return g.IntN(3000)
}

// random returns n random bytes.
func (g *generator) random(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(g.Uint32())
	}
	return b
}

// content returns the bytes of a blob of a media type, and the diff ID's content
// if it is that of a layer.
func (g *generator) content(mediaType string) (b, marker, plain []byte) {
	if mediaType != inToto && g.chance(0.03) {
		g.image.Features["empty layer"] = true
		if g.chance(0.5) {
			return nil, nil, nil
		}
		b = make([]byte, 1024) // a tar without files
		return compressed(mediaType, b), nil, b
	}
	marker = g.marker()
	switch mediaType {
	case tarLayer, gzipLayer, zstdLayer, dockerTar, dockerGzip, dockerZstd, foreignTar, foreignGzip, restricted, restricted + "+gzip", restricted + "+zstd":
		plain = tarOf(append(marker, g.random(g.length())...))
		return compressed(mediaType, plain), marker, plain
	case inToto, "application/spdx+json", "application/vnd.cyclonedx+json", "application/vnd.dev.sigstore.bundle.v0.3+json":
		marker = []byte(hex.EncodeToString(marker))
		b = fmt.Appendf(nil, `{"_type":"https://in-toto.io/Statement/v1","predicateType":"https://spdx.dev/Document","predicate":{"name":"%s"}}`, marker)
		return b, marker, nil
	}
	return append(g.random(g.length()), marker...), marker, nil
}

func tarOf(file []byte) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	w.WriteHeader(&tar.Header{Name: "file", Mode: 0o644, Size: int64(len(file))})
	w.Write(file)
	w.Close()
	return b.Bytes()
}

// compressed compresses b as the layer's type says, so that random bytes in it
// stay as they are.
func compressed(mediaType string, b []byte) []byte {
	var out bytes.Buffer
	switch {
	case bytes.HasSuffix([]byte(mediaType), []byte("gzip")):
		w, _ := gzip.NewWriterLevel(&out, gzip.NoCompression)
		w.Write(b)
		w.Close()
	case bytes.HasSuffix([]byte(mediaType), []byte("zstd")):
		w, err := zstd.NewWriter(&out, zstd.WithEncoderConcurrency(1))
		if err != nil {
			panic(err)
		}
		w.Write(b)
		w.Close()
	default:
		return b
	}
	return out.Bytes()
}

package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"hash"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// file is a file of a layer.
type file struct {
	tar.Header
	content string
}

// tarOf returns a tar archive.
func tarOf(t testing.TB, files ...file) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := f.Header
		h.Size = int64(len(f.content))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, f.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func day(n int) time.Time { return time.Date(2026, 1, n, 1, 2, 3, 0, time.UTC) }

func reg(name, content string) file {
	return file{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, content}
}

func dir(name string) file {
	return file{tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}, ""}
}

func hardLink(name, to string) file {
	return file{tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to}, ""}
}

// sparse returns a tar archive with a file of 1 MiB that has one byte.
func sparse(t testing.TB, name string) string {
	f := reg(name, "x")
	f.PAXRecords = map[string]string{"GNU_sparse.size": "1048576", "GNU_sparse.numblocks": "1", "GNU_sparse.map": "0,1"}
	return strings.ReplaceAll(tarOf(t, f), "GNU_sparse", "GNU.sparse") // which the library does not write
}

// allKinds is a layer with a file of each kind, and one of several chunks.
func allKinds(t testing.TB) string {
	large := make([]byte, 5<<20)
	rand.NewChaCha8([32]byte{}).Read(large)
	return tarOf(t,
		file{tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o755, ModTime: day(1)}, ""},
		file{tar.Header{Typeflag: tar.TypeDir, Name: "usr/", Mode: 0o1777, Uid: 7, Gid: 8, Uname: "u", Gname: "g", ModTime: day(2)}, ""},
		file{tar.Header{Typeflag: tar.TypeReg, Name: "usr/large", Mode: 0o4755, ModTime: day(3), PAXRecords: map[string]string{"SCHILY.xattr.user.x": "y\x00z"}}, string(large)},
		reg("usr/exactly", string(large[:4<<20])),
		reg("usr/empty", ""),
		reg("usr/"+strings.Repeat("long", 100), "content"),
		file{tar.Header{Typeflag: tar.TypeLink, Name: "usr/hard", Linkname: "usr/large"}, ""},
		file{tar.Header{Typeflag: tar.TypeSymlink, Name: "usr/soft", Linkname: "../etc"}, ""},
		file{tar.Header{Typeflag: tar.TypeChar, Name: "null", Devmajor: 1, Devminor: 3}, ""},
		file{tar.Header{Typeflag: tar.TypeBlock, Name: "disk", Devmajor: 8, Devminor: 1}, ""},
		file{tar.Header{Typeflag: tar.TypeFifo, Name: "pipe"}, ""},
		dir("etc/"),
		reg("etc/.wh.gone", ""),
		reg("é", "unicode"),
	)
}

// chunked is a layer in a format that can be pulled lazily.
type chunked struct {
	mediaType, blob string
	toc, diffID     digest.Digest
}

type zstdCompression struct {
	*zstdchunked.Decompressor
	*zstdchunked.Compressor
}

// build makes a layer with the library's Build, as nerdctl and ctr-remote do.
func build(t testing.TB, archive string, opts ...estargz.Option) chunked {
	t.Helper()
	b, err := estargz.Build(io.NewSectionReader(strings.NewReader(archive), 0, int64(len(archive))), append(opts, estargz.WithCompressionLevel(gzip.BestSpeed))...)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	blob, err := io.ReadAll(b)
	if err != nil {
		t.Fatal(err)
	}
	return chunked{ocispec.MediaTypeImageLayerGzip, string(blob), b.TOCDigest(), b.DiffID()}
}

// buildZstd makes a layer as nerdctl does with --zstdchunked.
func buildZstd(t testing.TB, archive string) chunked {
	t.Helper()
	c := build(t, archive, estargz.WithCompression(zstdCompression{new(zstdchunked.Decompressor), &zstdchunked.Compressor{CompressionLevel: zstd.SpeedDefault}}))
	c.mediaType = ocispec.MediaTypeImageLayerZstd
	return c
}

// buildLossless makes a layer as BuildKit does, which keeps the archive as it is.
func buildLossless(t testing.TB, archive string) chunked {
	t.Helper()
	var b bytes.Buffer
	w := estargz.NewWriterLevel(&b, gzip.BestSpeed)
	if err := w.AppendTarLossLess(strings.NewReader(archive)); err != nil {
		t.Fatal(err)
	}
	toc, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	return chunked{ocispec.MediaTypeImageLayerGzip, b.String(), toc, digest.Digest(w.DiffID())}
}

// forged makes a layer whose table of contents was changed. If covered is set, it is
// eStargz, where the diff ID covers that.
func forged(t testing.TB, archive string, covered bool, change func(toc *estargz.JTOC)) chunked {
	t.Helper()
	compress := estargz.Compressor(&zstdchunked.Compressor{CompressionLevel: zstd.SpeedDefault})
	mediaType := ocispec.MediaTypeImageLayerZstd
	if covered {
		compress, mediaType = estargz.NewGzipCompressor(), ocispec.MediaTypeImageLayerGzip
	}
	var b bytes.Buffer
	w := estargz.NewWriterWithCompressor(&b, forger{compress, change})
	if err := w.AppendTar(strings.NewReader(archive)); err != nil {
		t.Fatal(err)
	}
	toc, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	return chunked{mediaType, b.String(), toc, digest.Digest(w.DiffID())}
}

type forger struct {
	estargz.Compressor
	change func(toc *estargz.JTOC)
}

func (f forger) WriteTOCAndFooter(w io.Writer, off int64, toc *estargz.JTOC, h hash.Hash) (digest.Digest, error) {
	f.change(toc)
	return f.Compressor.WriteTOCAndFooter(w, off, toc, h)
}

// lazyImage puts an image of such layers.
func (s *store) lazyImage(layers ...chunked) ocispec.Descriptor {
	s.t.Helper()
	var descs []ocispec.Descriptor
	var ids []digest.Digest
	for _, l := range layers {
		d := s.put(l.mediaType, l.blob)
		d.Annotations = map[string]string{tocAnnotation: l.toc.String()}
		descs, ids = append(descs, d), append(ids, l.diffID)
	}
	config, err := json.Marshal(ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: ids}})
	if err != nil {
		s.t.Fatal(err)
	}
	return s.of(ocispec.MediaTypeImageConfig, string(config), descs)
}

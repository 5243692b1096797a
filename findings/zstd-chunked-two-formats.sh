#!/usr/bin/env bash
# Two formats have the name zstd:chunked. The library that podman, buildah, skopeo and
# CRI-O write layers with puts another footer and another table of contents at the end than
# the library that stargz-snapshotter, and nerdctl's "image convert --zstdchunked", read.
# So layers of the one are not pulled lazily by the other, and nothing in their media types
# tells them apart.
set -euo pipefail
dir=$(mktemp -d)
trap 'chmod -R u+w "$dir"; rm -rf "$dir"' EXIT
export GOFLAGS=-buildvcs=false CGO_ENABLED=0
cd "$dir"
cat >main.go <<'GO'
package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/zstd"
	"go.podman.io/storage/pkg/chunked/compressor"
)

func check(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

// read opens a layer, and says whether it finds the file.
func read(name string, layer []byte) {
	r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(layer), 0, int64(len(layer))), estargz.WithDecompressors(new(zstdchunked.Decompressor)))
	if err != nil {
		fmt.Printf("%s: not opened: %v\n", name, err)
		return
	}
	_, found := r.Lookup("etc/file")
	fmt.Printf("%s: opened, etc/file found: %t\n", name, found)
	f, err := r.OpenFile("etc/file")
	if err != nil {
		fmt.Printf("%s: not read: %v\n", name, err)
		return
	}
	b := make([]byte, f.Size())
	_, err = f.ReadAt(b, 0)
	fmt.Printf("%s: read: %v\n", name, err)
}

func main() {
	var layer bytes.Buffer
	tw := tar.NewWriter(&layer)
	content := bytes.Repeat([]byte("a line\n"), 1000)
	check(tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "etc/", Mode: 0o755}))
	check(tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "etc/file", Mode: 0o644, Size: int64(len(content))}))
	_, err := tw.Write(content)
	check(err)
	check(tw.Close())

	var podman bytes.Buffer
	annotations := map[string]string{}
	w, err := compressor.ZstdCompressor(&podman, annotations, nil)
	check(err)
	_, err = w.Write(layer.Bytes())
	check(err)
	check(w.Close())
	fmt.Println(slices.Sorted(maps.Keys(annotations)))
	read("podman's library", podman.Bytes())

	blob, err := estargz.Build(io.NewSectionReader(bytes.NewReader(layer.Bytes()), 0, int64(layer.Len())),
		estargz.WithCompression(&struct {
			*zstdchunked.Compressor
			*zstdchunked.Decompressor
		}{&zstdchunked.Compressor{CompressionLevel: zstd.SpeedDefault, Metadata: map[string]string{}}, new(zstdchunked.Decompressor)}))
	check(err)
	own, err := io.ReadAll(blob)
	check(err)
	read("stargz-snapshotter's library", own)
}
GO
(
	go mod init example.com/module
	go get go.podman.io/storage@v1.65.1 github.com/containerd/stargz-snapshotter/estargz@v0.19.1 github.com/klauspost/compress@v1.20.4
	go mod tidy
	go build -o program .
) >log 2>&1 || { cat log; exit 1; }
echo "go.podman.io/storage 1.65.1, stargz-snapshotter/estargz 0.19.1:"
./program | tee out
grep -q '^podman.s library: not opened: ' out
grep -q '^stargz-snapshotter.s library: opened, etc/file found: true$' out

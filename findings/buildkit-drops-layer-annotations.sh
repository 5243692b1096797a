#!/usr/bin/env bash
# BuildKit 0.34.2 keeps the layers of a base image and drops the annotations of
# their descriptors, without a word. An image encrypted with ocicrypt has its
# wrapped layer keys there, so what is built on one has layers of the media type
# "…+encrypted" that can't be decrypted by anyone, and the build succeeds.
#
# If the layers have to be unpacked, the OCI worker takes the ciphertext for a
# tar archive: "archive/tar: invalid tar header". It does not say that the media
# type is not supported, as it does with force-compression.
#
# Needs Go, root (the worker mounts), and runc. Exits 1 if this has changed.
set -euo pipefail
dir=$(mktemp -d)
daemon=
cleanup() {
	if [ -n "$daemon" ]; then
		kill "$daemon" 2>/dev/null || true
		wait "$daemon" 2>/dev/null || true
	fi
	rm -rf --one-file-system "$dir"
}
trap cleanup EXIT
cd "$dir"
export GOFLAGS=-buildvcs=false CGO_ENABLED=0

mkdir buildkit image work
(
	cd buildkit
	go mod init example.com/buildkit
	go get -tool github.com/moby/buildkit/cmd/buildkitd@v0.34.2 github.com/moby/buildkit/cmd/buildctl@v0.34.2
	go build -ldflags "-s -w" -o .. tool
) >build.log 2>&1 || { cat build.log; exit 1; }

# An OCI layout of an image with one layer, encrypted with a JWE recipient.
cat >image/main.go <<'EOF'
package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"os"

	"github.com/containers/ocicrypt"
	"github.com/containers/ocicrypt/config"
	"github.com/containers/ocicrypt/utils"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func blob(mediaType string, b []byte) v1.Descriptor {
	d := digest.FromBytes(b)
	if err := os.WriteFile("layout/blobs/sha256/"+d.Encoded(), b, 0o644); err != nil {
		panic(err)
	}
	return v1.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(b))}
}

func marshal(v any) []byte { return must(json.Marshal(v)) }

func main() {
	if err := os.MkdirAll("layout/blobs/sha256", 0o755); err != nil {
		panic(err)
	}
	var plain bytes.Buffer
	w := tar.NewWriter(&plain)
	w.WriteHeader(&tar.Header{Name: "file", Mode: 0o644, Size: 5})
	w.Write([]byte("hello"))
	w.Close()
	public, _, err := utils.CreateRSATestKey(2048, nil, true)
	if err != nil {
		panic(err)
	}
	desc := v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: digest.FromBytes(plain.Bytes()), Size: int64(plain.Len())}
	ec := &config.EncryptConfig{Parameters: map[string][][]byte{"pubkeys": {public}}}
	r, finish, err := ocicrypt.EncryptLayer(ec, bytes.NewReader(plain.Bytes()), desc)
	if err != nil {
		panic(err)
	}
	layer := blob(v1.MediaTypeImageLayer+"+encrypted", must(io.ReadAll(r)))
	layer.Annotations = must(finish())
	conf := blob(v1.MediaTypeImageConfig, marshal(v1.Image{
		Platform: v1.Platform{OS: "linux", Architecture: "amd64"},
		RootFS:   v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{desc.Digest}},
	}))
	manifest := blob(v1.MediaTypeImageManifest, marshal(v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, Config: conf, Layers: []v1.Descriptor{layer},
	}))
	os.WriteFile("layout/oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644)
	os.WriteFile("layout/index.json", marshal(v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []v1.Descriptor{manifest}}), 0o644)
	os.WriteFile("digest", []byte(manifest.Digest), 0o644)
}
EOF
(
	cd image
	go mod init example.com/image
	go get github.com/containers/ocicrypt@v1.3.2 github.com/opencontainers/image-spec@v1.1.1
	go mod tidy
	go build -o ../makeimage .
) >build.log 2>&1 || { cat build.log; exit 1; }
./makeimage

cat >buildkitd.toml <<EOF
root = '$dir/root'
[grpc]
  address = ['unix://$dir/buildkitd.sock']
[otel]
  socketPath = '$dir/otel.sock'
[worker.containerd]
  enabled = false
[worker.oci]
  enabled = true
  networkMode = 'host'
EOF
./buildkitd --config buildkitd.toml >buildkitd.log 2>&1 &
daemon=$!
buildctl() { ./buildctl --addr "unix://$dir/buildkitd.sock" "$@"; }
for _ in $(seq 300); do
	buildctl debug workers >/dev/null 2>&1 && break
	sleep 0.2
done
buildctl debug workers >/dev/null || { cat buildkitd.log; exit 1; }
build() {
	buildctl build --progress plain --frontend dockerfile.v0 --local context=work --local dockerfile=work \
		--oci-layout "base=$dir/layout" --opt "context:base=oci-layout://base@$(cat digest)" "$@"
}
layers() { # of the image in an archive or a layout
	jq -c '.layers[] | [.mediaType, ((.annotations // {}) | keys | map(select(startswith("org.opencontainers.image.enc."))))]' "$1"
}

go version -m buildkitd | grep -m1 -o "github.com/moby/buildkit[[:space:]]v[^[:space:]]*"
echo "the base image's layer, and its annotations about encryption:"
base=layout/blobs/sha256/$(cut -d: -f2 digest)
layers "$base"

printf 'FROM base\nLABEL a=b\n' >work/Dockerfile
build --output type=oci,dest=out.tar >out.log 2>&1 || { cat out.log; exit 1; }
mkdir out && tar xf out.tar -C out
echo "the same layer in the image that was built on it:"
built=out/blobs/sha256/$(jq -r '.manifests[0].digest' out/index.json | cut -d: -f2)
layers "$built"

printf 'FROM base\nCOPY Dockerfile /\n' >work/Dockerfile
echo "with a COPY on top:"
build >copy.log 2>&1 && { echo "it was built"; exit 1; }
grep -m1 '^error: ' copy.log

[ "$(layers "$base")" = '["application/vnd.oci.image.layer.v1.tar+encrypted",["org.opencontainers.image.enc.keys.jwe","org.opencontainers.image.enc.pubopts"]]' ]
[ "$(layers "$built")" = '["application/vnd.oci.image.layer.v1.tar+encrypted",[]]' ]
[ "$(jq -r '.layers[0].digest' "$base")" = "$(jq -r '.layers[0].digest' "$built")" ]
grep -q 'archive/tar: invalid tar header' copy.log

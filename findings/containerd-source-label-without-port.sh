#!/usr/bin/env bash
# containerd notes from which registry and repositories a blob came, to mount it there
# later instead of uploading it. The label has the registry's name without its port, so
# two registries on one machine are the same to it, and their repositories end up in one
# list.
set -euo pipefail
dir=$(mktemp -d)
trap 'chmod -R u+w "$dir"; rm -rf "$dir"' EXIT
export GOFLAGS=-buildvcs=false
cd "$dir"
cat >main.go <<'GO'
package main

import (
	"bytes"
	"context"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

type labels map[digest.Digest]map[string]string

func (l labels) Get(d digest.Digest) (map[string]string, error)  { return l[d], nil }
func (l labels) Set(d digest.Digest, s map[string]string) error { l[d] = s; return nil }
func (l labels) Update(d digest.Digest, s map[string]string) (map[string]string, error) {
	if l[d] == nil {
		l[d] = map[string]string{}
	}
	for k, v := range s {
		l[d][k] = v
	}
	return l[d], nil
}

func check(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func main() {
	ctx, blob := context.Background(), []byte("a layer")
	store, err := local.NewLabeledStore(os.Args[1], labels{})
	check(err)
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(blob), Size: int64(len(blob))}
	check(content.WriteBlob(ctx, store, "blob", bytes.NewReader(blob), desc))
	for _, ref := range []string{"registry.example.com:5000/team/app:1", "registry.example.com:6000/other/app:1"} {
		note, err := docker.AppendDistributionSourceLabel(store, ref)
		check(err)
		_, err = note.Handle(ctx, desc)
		check(err)
	}
	info, err := store.Info(ctx, desc.Digest)
	check(err)
	for k, v := range info.Labels {
		fmt.Println(k + "=" + v)
	}
}
GO
(go mod init example.com/module && go get github.com/containerd/containerd/v2@v2.4.2 && go mod tidy && go build -o program .) >log 2>&1 || { cat log; exit 1; }
echo "containerd 2.4.2, a blob of registry.example.com:5000/team/app and registry.example.com:6000/other/app:"
./program "$dir/store" 2>/dev/null | tee out
[ "$(cat out)" = containerd.io/distribution.source.registry.example.com=other/app,team/app ]

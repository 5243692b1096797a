#!/usr/bin/env bash
# Debian 13's containerd 1.7.24 sends a proxy differ no namespace. The call of a client of
# the diff service, such as ctr, reaches the proxy plugin without the metadata
# containerd-namespace, so the differ can't know whose content it is about. containerd
# 1.7.24 that is built with upstream's own go.mod sends it.
#
# Exits non-zero if that changes. Needs root, Debian 12 or 13 on amd64 with Debian's
# keyring, and Go. Installs nothing on the machine.
set -euo pipefail
containerd='1.7.24~ds1-6+deb13u1'

dir=$(mktemp -d)
pids=()
cleanup() {
	for p in "${pids[@]}"; do kill "$p" 2>/dev/null || true; wait "$p" 2>/dev/null || true; done
	rm -rf --one-file-system "$dir"
}
trap cleanup EXIT
cd "$dir"

# The package, by an apt that has only Debian 13 and its state here.
mkdir -p apt/lists/partial apt/cache/archives/partial
cat >apt/sources <<END
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian-security trixie-security main
END
apt=(apt-get -qq -o Dir::Etc::SourceList="$dir/apt/sources" -o Dir::Etc::SourceParts=- -o Dir::State::Lists="$dir/apt/lists"
	-o Dir::Cache="$dir/apt/cache" -o APT::Sandbox::User=root -o Acquire::Languages=none)
("${apt[@]}" update && "${apt[@]}" download containerd="$containerd") >apt.log 2>&1 || { cat apt.log; exit 2; }
dpkg-deb -x containerd_*.deb root

# A differ that prints the metadata and leaves the work to the next.
mkdir differ
cat >differ/main.go <<'GO'
package main

import (
	"context"
	"fmt"
	"net"
	"os"

	diff "github.com/containerd/containerd/api/services/diff/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

type differ struct{ diff.UnimplementedDiffServer }

func (differ) Apply(ctx context.Context, r *diff.ApplyRequest) (*diff.ApplyResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	fmt.Printf("Apply: containerd-namespace %q\n", md.Get("containerd-namespace"))
	return nil, status.Error(codes.Unimplemented, "not by this differ")
}

func main() {
	l, err := net.Listen("unix", os.Args[1])
	if err != nil {
		panic(err)
	}
	s := grpc.NewServer()
	diff.RegisterDiffServer(s, differ{})
	panic(s.Serve(l))
}
GO
(
	cd differ
	go mod init example.com/differ &&
		go get github.com/containerd/containerd/api/services/diff/v1@v1.8.0 google.golang.org/grpc@v1.75.0 &&
		CGO_ENABLED=0 go build -buildvcs=false -o ../differ.bin .
) >build.log 2>&1 || { cat build.log; exit 2; }

cat >config.toml <<END
version = 2
root = '$dir/data'
state = '$dir/state'
disabled_plugins = ['io.containerd.grpc.v1.cri']
[grpc]
  address = '$dir/sock'
[proxy_plugins.probe]
  type = 'diff'
  address = '$dir/differ.sock'
[plugins.'io.containerd.service.v1.diff-service']
  default = ['probe', 'walking']
END
./differ.bin "$dir/differ.sock" >differ.log 2>&1 &
pids+=($!)
root/usr/bin/containerd --config config.toml >log 2>&1 &
pids+=($!)
ctr() { root/usr/bin/ctr --address "$dir/sock" --namespace test "$@"; }
for _ in $(seq 300); do
	! ctr version >/dev/null 2>&1 || break
	sleep 0.2
done
root/usr/bin/containerd --version

# An image of one plain layer.
blob() { # FILE MEDIA-TYPE: adds it and prints its descriptor
	local sum
	sum=$(sha256sum "$1" | cut -d' ' -f1)
	cp "$1" "layout/blobs/sha256/$sum"
	printf '{"mediaType":"%s","digest":"sha256:%s","size":%d' "$2" "$sum" "$(stat -c %s "$1")"
}
mkdir -p layout/blobs/sha256
echo hi >file
tar -cf layer file
printf '{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' "$(sha256sum layer | cut -d' ' -f1)" >image
printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":%s},"layers":[%s}]}' \
	"$(blob image application/vnd.oci.image.config.v1+json)" "$(blob layer application/vnd.oci.image.layer.v1.tar)" >manifest
printf '{"schemaVersion":2,"manifests":[%s,"annotations":{"io.containerd.image.name":"app:1"}}]}' "$(blob manifest application/vnd.oci.image.manifest.v1+json)" >layout/index.json
echo '{"imageLayoutVersion":"1.0.0"}' >layout/oci-layout
tar -C layout -cf app.tar .
ctr images import --snapshotter native app.tar >import.log 2>&1 || { cat import.log log; exit 2; }
cat differ.log
[ "$(cat differ.log)" = 'Apply: containerd-namespace []' ]

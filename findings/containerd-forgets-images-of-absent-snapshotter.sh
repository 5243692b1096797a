#!/usr/bin/env bash
# A containerd that starts while the proxy snapshotter of its CRI plugin is away forgets all
# images for the kubelet: CRI asks the snapshotter once, when it starts, whether each image is
# unpacked, and leaves those out of its list for which it gets no answer. They stay away once
# the snapshotter is back, while containerd's own list has them, until containerd is
# restarted. So the kubelet pulls them all again, and pods with imagePullPolicy: Never, or
# images that are in no registry, do not start.
#
# Exits non-zero if that changes. Needs root and Go. Installs nothing on the machine.
set -euo pipefail
containerd=v2.4.2

exec 3>&2
dir=$(mktemp -d)
declare -A pids
stop() {
	[ -n "${pids[$1]:-}" ] || return 0
	kill "${pids[$1]}" 2>/dev/null || true
	wait "${pids[$1]}" 2>/dev/null || true
	pids[$1]=
}
cleanup() {
	local failed=$?
	[ "$failed" = 0 ] || tail -n 5 "$dir"/{seen,log,containerd.log} >&3 2>/dev/null || true
	stop containerd
	stop snapshotter
	rm -rf --one-file-system "$dir"
}
trap cleanup EXIT
cd "$dir"

cat >go.mod <<END
module example.com/images
go 1.26
END
cat >main.go <<'GO'
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/plugins/snapshots/native"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
}

func main() {
	switch os.Args[1] {
	case "image": // makes one
		img, err := random.Image(1000, 1)
		check(err)
		config, err := img.ConfigFile()
		check(err)
		config.OS, config.Architecture = "linux", runtime.GOARCH
		img, err = mutate.ConfigFile(img, config)
		check(err)
		ref, err := name.NewTag("registry.example.com/app:1")
		check(err)
		check(tarball.WriteToFile(os.Args[2], ref, img))
	case "snapshotter": // serves containerd's own "native"
		s, err := native.NewSnapshotter(os.Args[3])
		check(err)
		l, err := net.Listen("unix", os.Args[2])
		check(err)
		server := grpc.NewServer()
		snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(s))
		check(server.Serve(l))
	case "images": // counts those of the CRI
		conn, err := grpc.NewClient("unix://"+os.Args[2], grpc.WithTransportCredentials(insecure.NewCredentials()))
		check(err)
		r, err := cri.NewImageServiceClient(conn).ListImages(context.Background(), &cri.ListImagesRequest{}, grpc.WaitForReady(true))
		check(err)
		fmt.Println(len(r.Images))
	}
}
GO
export GOFLAGS=-mod=mod GOBIN=$dir/bin
{
	go get "github.com/containerd/containerd/v2@$containerd" github.com/google/go-containerregistry@v0.22.1 k8s.io/cri-api@v0.37.0
	go build -o images .
	GOFLAGS= go install "github.com/containerd/containerd/v2/cmd/containerd@$containerd" "github.com/containerd/containerd/v2/cmd/ctr@$containerd"
} >build.log 2>&1 || { tail -20 build.log; exit 2; }
cat >config.toml <<END
version = 3
root = '$dir/root'
state = '$dir/state'
[grpc]
  address = '$dir/c.sock'
[proxy_plugins.outside]
  type = 'snapshot'
  address = '$dir/s.sock'
[plugins.'io.containerd.cri.v1.images']
  snapshotter = 'outside'
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = 'linux'
  snapshotter = 'outside'
[plugins.'io.containerd.nri.v1.nri']
  disable = true
END

await() {
	for _ in $(seq 300); do "$@" >/dev/null 2>&1 && return; sleep 0.1; done
	echo "not in time: $*" >&2
	exit 2
}
start_snapshotter() {
	rm -f s.sock
	./images snapshotter "$dir/s.sock" "$dir/snapshots" & pids[snapshotter]=$!
	await test -S s.sock
}
start_containerd() {
	bin/containerd --config "$dir/config.toml" >>containerd.log 2>&1 & pids[containerd]=$!
	await bin/ctr --address "$dir/c.sock" --namespace k8s.io images list --quiet
	await ./images images "$dir/c.sock"
}
count() { echo "$1: CRI $(./images images "$dir/c.sock"), containerd $(bin/ctr --address "$dir/c.sock" --namespace k8s.io images list --quiet | grep -c '^registry')"; }

{
	start_snapshotter
	start_containerd
	./images image image.tar
	bin/ctr --address "$dir/c.sock" --namespace k8s.io images import --local --snapshotter outside image.tar >&2
	await sh -c "[ \"\$(./images images '$dir/c.sock')\" = 1 ]"
	count imported
	stop containerd
	start_containerd
	count "containerd restarted"
	stop containerd
	stop snapshotter
	start_containerd
	start_snapshotter
	await bin/ctr --address "$dir/c.sock" --namespace k8s.io snapshots --snapshotter outside list
	sleep 5
	count "the snapshotter started after it"
	stop containerd
	start_containerd
	count "containerd restarted again"
} >seen 2>log

echo "containerd $containerd"
cat seen
diff seen - <<'END'
imported: CRI 1, containerd 1
containerd restarted: CRI 1, containerd 1
the snapshotter started after it: CRI 0, containerd 1
containerd restarted again: CRI 1, containerd 1
END

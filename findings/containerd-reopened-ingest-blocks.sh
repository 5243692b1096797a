#!/usr/bin/env bash
# containerd digests what an interrupted download left behind when the ingest is
# opened again, and does so inside a transaction of its metadata database. Until it
# is through, whatever else changes the database waits: leases, snapshots, images,
# containers, of all namespaces. With a layer of several GiB that is many seconds,
# in which no container starts on the node. While the ingest is written to, nothing
# waits.
#
# Exits non-zero if that changes. Needs Go, root, and 1 GiB below the directory for
# temporary files.
set -euo pipefail
version=v2.4.2

dir=$(mktemp -d)
daemon=
cleanup() {
	if [ -n "$daemon" ]; then
		kill "$daemon" 2>/dev/null || true
		wait "$daemon" 2>/dev/null || true
	fi
	chmod -R u+w "$dir"
	rm -rf --one-file-system "$dir"
}
trap cleanup EXIT
cd "$dir"
export GOFLAGS=-buildvcs=false CGO_ENABLED=0
cat >main.go <<'GO'
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func main() {
	client := must(containerd.New(os.Args[1]))
	downloads := namespaces.WithNamespace(context.Background(), "downloads")
	others := namespaces.WithNamespace(context.Background(), "others")
	// during does something, and returns how long it took, and the creation of the
	// slowest lease meanwhile.
	during := func(do func()) (took, slowest time.Duration) {
		done := make(chan time.Duration)
		go func() {
			start := time.Now()
			do()
			done <- time.Since(start)
		}()
		for {
			select {
			case took := <-done:
				return took, slowest
			case <-time.After(20 * time.Millisecond):
				start := time.Now()
				must(client.LeasesService().Create(others, leases.WithRandomID()))
				slowest = max(slowest, time.Since(start))
			}
		}
	}
	open := func() content.Writer {
		for {
			w, err := client.ContentStore().Writer(downloads, content.WithRef("layer"))
			if !errdefs.IsUnavailable(err) {
				return must(w, err)
			}
			time.Sleep(50 * time.Millisecond) // the first has not let go of it yet
		}
	}

	written, idle := during(func() {
		w, piece := open(), make([]byte, 1<<20)
		for range 1024 {
			must(w.Write(piece))
		}
		w.Close() // as when the connection to a registry ends
	})
	time.Sleep(time.Second)
	fmt.Printf("1 GiB is written in %v: a lease takes %v at most\n", written, idle)
	opened, waited := during(func() {
		w := open()
		if offset := must(w.Status()).Offset; offset != 1<<30 {
			panic(offset)
		}
		w.Close()
	})
	fmt.Printf("it is opened again in %v: a lease takes %v at most\n", opened, waited)
	if waited < opened/2 || waited < 3*idle {
		fmt.Println("that has changed")
		os.Exit(1)
	}
}
GO
(
	go mod init example.com/finding
	go get github.com/containerd/containerd/v2/client@$version
	go get -tool github.com/containerd/containerd/v2/cmd/containerd@$version
	go mod tidy
	go build -o containerd github.com/containerd/containerd/v2/cmd/containerd
	go build -o finding .
) >build.log 2>&1 || { tail build.log; exit 2; }

cat >config.toml <<END
version = 3
root = '$dir/root'
state = '$dir/state'
disabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.cri.v1.images', 'io.containerd.cri.v1.runtime', 'io.containerd.nri.v1.nri']
[grpc]
  address = '$dir/sock'
END
./containerd --config config.toml >log 2>&1 &
daemon=$!
for _ in $(seq 600); do
	! grep -q "successfully booted" log || break
	sleep 0.1
done
echo "containerd $version"
./finding "$dir/sock" || { status=$?; tail -3 log; exit $status; }

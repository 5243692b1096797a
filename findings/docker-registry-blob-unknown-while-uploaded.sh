#!/usr/bin/env bash
# docker-registry 2.8 (distribution) may refuse a manifest with 400
# MANIFEST_BLOB_UNKNOWN although it has all of its blobs, and serves them: for a
# moment after another client has uploaded one of them once more. It writes the file
# that says that the repository has the blob anew, by truncating it first, and takes
# a file that is empty for a blob that it does not know. Two jobs that push images
# with common layers at the same time meet it now and then; here some clients do
# nothing else. The same manifest is taken once they have stopped.
#
# Exits non-zero if that changes. Needs Debian 12 with its sources for apt, and Go.
# Installs nothing.
set -euo pipefail
registry=2.8.2+ds1-1

dir=$(mktemp -d)
daemon=
cleanup() {
	if [ -n "$daemon" ]; then
		kill "$daemon" 2>/dev/null || true
		wait "$daemon" 2>/dev/null || true
	fi
	rm -rf "$dir"
}
trap cleanup EXIT
cd "$dir"
(apt-get download docker-registry=$registry) >apt.log 2>&1 || { cat apt.log; exit 2; }
dpkg-deb -x docker-registry_*.deb root
port=$(python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
cat >config.yml <<END
version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: $dir/storage}}
http: {addr: '127.0.0.1:$port'}
END
root/usr/bin/docker-registry serve config.yml >log 2>&1 &
daemon=$!

cat >main.go <<'GO'
package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"
)

var base = "http://" + os.Args[1] + "/v2/app/"

func request(method, url, mediaType string, body []byte) (int, http.Header, string) {
	req, err := http.NewRequest(method, url, bytes.NewReader(body))
	if err != nil {
		panic(err)
	}
	req.Header.Set("Content-Type", mediaType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		panic(err)
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, resp.Header, string(b)
}

func digest(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }

func upload(b []byte) {
	status, header, body := request("POST", base+"blobs/uploads/", "", nil)
	if status != http.StatusAccepted {
		panic(body)
	}
	if status, _, body = request("PUT", header.Get("Location")+"&digest="+digest(b), "application/octet-stream", b); status != http.StatusCreated {
		panic(body)
	}
}

type descriptor struct {
	MediaType string `json:"mediaType"`
	Digest    string `json:"digest"`
	Size      int    `json:"size"`
}

func main() {
	http.DefaultTransport.(*http.Transport).MaxIdleConnsPerHost = 32
	const manifestType = "application/vnd.oci.image.manifest.v1+json"
	var blobs [][]byte
	var layers []descriptor
	for i := range 50 {
		blobs = append(blobs, fmt.Appendf(nil, "layer %d", i))
		layers = append(layers, descriptor{"application/vnd.oci.image.layer.v1.tar", digest(blobs[i]), len(blobs[i])})
		upload(blobs[i])
	}
	config := []byte("{}")
	upload(config)
	manifest, _ := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": manifestType,
		"config": descriptor{"application/vnd.oci.image.config.v1+json", digest(config), len(config)}, "layers": layers})
	push := func() (int, string) {
		status, _, body := request("PUT", base+"manifests/1", manifestType, manifest)
		return status, strings.TrimSpace(body)
	}
	for range 50 {
		if status, body := push(); status != http.StatusCreated {
			panic(body)
		}
	}
	fmt.Println("nobody else uploads: 50 of 50 pushes of the manifest succeed")

	stop := make(chan struct{})
	var clients sync.WaitGroup
	for client := range 8 {
		clients.Go(func() {
			for i := client; ; i++ {
				select {
				case <-stop:
					return
				default:
					upload(blobs[i%len(blobs)])
				}
			}
		})
	}
	refused, pushes, first := 0, 0, ""
	for start := time.Now(); refused < 5 && time.Since(start) < 2*time.Minute; pushes++ {
		if status, body := push(); status == http.StatusBadRequest && strings.Contains(body, "MANIFEST_BLOB_UNKNOWN") {
			refused++
			first = body
		}
	}
	close(stop)
	clients.Wait()
	fmt.Printf("others upload its blobs again: %d of %d pushes are refused: %s\n", refused, pushes, first)
	status, body := push()
	fmt.Println("they have stopped:", status, body)
	if refused == 0 || status != http.StatusCreated {
		fmt.Println("that has changed")
		os.Exit(1)
	}
}
GO
go mod init example.com/finding >/dev/null 2>&1
go build -buildvcs=false -o finding .
for _ in $(seq 300); do
	! curl -sf "http://127.0.0.1:$port/v2/" >/dev/null || break
	sleep 0.1
done
echo "docker-registry $registry"
./finding "127.0.0.1:$port"

#!/usr/bin/env bash
# The registry that go-containerregistry has as a library, pkg/registry with
# WithReferrersSupport, lists referrers with the media type of their configuration as
# artifactType, also where the manifest has an artifactType of its own. The
# distribution specification wants the manifest's; the configuration's stands in only
# where there is none. An artifact in the form that the image specification recommends
# has an empty configuration, so all of them are listed as
# application/vnd.oci.empty.v1+json, and a client that looks for signatures or SBOMs by
# their type finds none.
#
# Exits non-zero if that changes. Needs Go, curl and jq.
set -euo pipefail
version=v0.22.1

dir=$(mktemp -d)
server=
cleanup() {
	if [ -n "$server" ]; then
		kill "$server" 2>/dev/null || true
		wait "$server" 2>/dev/null || true
	fi
	rm -rf "$dir"
}
trap cleanup EXIT
cd "$dir"
cat >main.go <<'GO'
package main

import (
	"fmt"
	"net"
	"net/http"

	"github.com/google/go-containerregistry/pkg/registry"
)

func main() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println("port", l.Addr().(*net.TCPAddr).Port)
	panic(http.Serve(l, registry.New(registry.WithReferrersSupport(true))))
}
GO
(go mod init finding && go get github.com/google/go-containerregistry@$version && go mod tidy && go build -buildvcs=false -o finding .) >build.log 2>&1 || { cat build.log; exit 2; }
./finding >log 2>&1 &
server=$!
port=
for _ in $(seq 300); do
	port=$(sed -n 's/^port //p' log)
	[ -z "$port" ] || break
	sleep 0.1
done
registry=http://127.0.0.1:$port/v2/app

manifest=application/vnd.oci.image.manifest.v1+json
kind=application/vnd.example.sbom
digest() { printf 'sha256:%s' "$(sha256sum "$1" | cut -d' ' -f1)"; }
blob() { # FILE
	curl -sf -X POST -H 'Content-Type: application/octet-stream' --data-binary @"$1" "$registry/blobs/uploads/?digest=$(digest "$1")"
}
put() { # FILE: pushes a manifest
	curl -sf -X PUT -H "Content-Type: $manifest" --data-binary @"$1" "$registry/manifests/$(digest "$1")"
}
printf '{}' >empty
blob empty
config="{\"mediaType\":\"application/vnd.oci.empty.v1+json\",\"digest\":\"$(digest empty)\",\"size\":2}"
printf '{"schemaVersion":2,"mediaType":"%s","config":%s,"layers":[]}' $manifest "$config" >image
put image
printf '{"schemaVersion":2,"mediaType":"%s","artifactType":"%s","config":%s,"layers":[%s],"subject":{"mediaType":"%s","digest":"%s","size":%d}}' \
	$manifest $kind "$config" "$config" $manifest "$(digest image)" "$(stat -c %s image)" >artifact
put artifact
echo "github.com/google/go-containerregistry $version"
echo "the manifest says $(curl -sf "$registry/manifests/$(digest artifact)" | jq -c .artifactType)"
listed=$(curl -sf "$registry/referrers/$(digest image)" | jq -c '[.manifests[].artifactType]')
echo "the list of referrers says $listed"
[ "$listed" = '["application/vnd.oci.empty.v1+json"]' ] || { echo "that has changed"; exit 1; }

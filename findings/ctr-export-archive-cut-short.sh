#!/usr/bin/env bash
# "ctr images export" through containerd's transfer service, the default in containerd 2, ends
# with status 0 before the archive is written: containerd answers once it has sent the last
# bytes, and ctr does not wait for its own goroutine that writes them. Where the output is a
# pipe and its reader is slow at the end (ssh, zstd, an upload), the last bytes are lost
# without an error, up to 128 KiB. To a file this happens by chance on a busy machine, and the
# file of a small image was even empty. With --local the archive is whole.
#
# Exits non-zero if that changes. Needs root and Go. Installs nothing on the machine.
set -euo pipefail
containerd=v2.4.2

dir=$(mktemp -d)
pid=
cleanup() {
	local failed=$?
	[ "$failed" = 0 ] || tail -n 5 "$dir"/*.log >&2 2>/dev/null || true
	[ -z "$pid" ] || { kill "$pid" 2>/dev/null || true; wait "$pid" 2>/dev/null || true; }
	rm -rf --one-file-system "$dir"
}
trap cleanup EXIT
cd "$dir"

GOBIN=$dir CGO_ENABLED=0 go install "github.com/containerd/containerd/v2/cmd/containerd@$containerd" 2>go.log
GOBIN=$dir CGO_ENABLED=0 go install "github.com/containerd/containerd/v2/cmd/ctr@$containerd" 2>>go.log

# An image of one layer of 64 KiB.
mkdir -p image/blobs/sha256
blob() { # its digest, after storing $1
	local digest
	digest=$(sha256sum "$1" | cut -d ' ' -f 1)
	cp "$1" "image/blobs/sha256/$digest"
	echo "$digest"
}
head -c 65536 /dev/urandom >file
tar -cf layer file
layer=$(blob layer)
printf '{"architecture":"%s","os":"linux","rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' "$(go env GOARCH)" "$layer" >config
config=$(blob config)
printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:%s","size":%d},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:%s","size":%d}]}' \
	"$config" "$(stat -c %s config)" "$layer" "$(stat -c %s layer)" >manifest
printf '{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:%s","size":%d,"annotations":{"io.containerd.image.name":"registry.example.com/app:1"}}]}' \
	"$(blob manifest)" "$(stat -c %s manifest)" >image/index.json
printf '{"imageLayoutVersion":"1.0.0"}' >image/oci-layout
tar -C image -cf image.tar oci-layout index.json blobs

cat >config.toml <<END
version = 3
root = '$dir/root'
state = '$dir/state'
disabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.cri.v1.images', 'io.containerd.cri.v1.runtime', 'io.containerd.nri.v1.nri']
[grpc]
  address = '$dir/containerd.sock'
[ttrpc]
  address = '$dir/containerd.sock.ttrpc'
END
./containerd --config config.toml >containerd.log 2>&1 &
pid=$!
ctr() { ./ctr --address "$dir/containerd.sock" "$@"; }
for _ in $(seq 100); do
	! ctr version >/dev/null 2>&1 || break
	sleep 0.1
done
ctr images import --no-unpack image.tar >import.log

# The reader starts after a second.
export_slowly() { # into file $1, with flags $2...
	local to=$1
	shift
	ctr images export "$@" - registry.example.com/app:1 | { sleep 1; cat; } >"$to"
}
export_slowly local.tar --local
export_slowly default.tar
whole=$(stat -c %s local.tar)
got=$(stat -c %s default.tar)
echo "ctr $containerd: exit status 0 both times; --local: $whole bytes, without: $got bytes"
tar -tf local.tar >/dev/null || { echo "the archive of --local is not whole"; exit 1; }
[ "$got" -lt "$whole" ] || { echo "nothing was lost"; exit 1; }
if tar -tf default.tar >/dev/null 2>tar.log; then
	echo "tar reads the archive to its end"
	exit 1
fi
tail -n 2 tar.log

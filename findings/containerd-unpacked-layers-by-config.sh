#!/usr/bin/env bash
# containerd knows unpacked layers by the digests of their uncompressed archives, in
# the image's configuration. If a snapshot with that chain is there, it does not look
# at the blobs of another image that has the same configuration. Anybody who can read
# an image's configuration, which is not encrypted, can push a manifest with it and
# any blobs as layers: on a node that has the image unpacked, containers of the new
# one get its files.
#
# The snapshots stay for as long as the forged image does, without the other image and
# its blobs.
#
# What may be run can therefore not be decided by the manifest that a pod names, nor by
# blobs that are there: it takes the diff IDs, and a record of which were encrypted.
#
# Exits non-zero if that changes. Needs Go, the network, and root for a mount
# namespace, in which all of this happens.
set -euo pipefail
version=v2.4.2

dir=$(mktemp -d)
trap 'chmod -R u+w "$dir"; rm -rf "$dir"' EXIT
mkdir "$dir/module"
(
	cd "$dir/module"
	go mod init example.com/module
	go get -tool github.com/containerd/containerd/v2/cmd/{containerd,ctr}@$version
	GOFLAGS=-buildvcs=false go build -o "$dir/" github.com/containerd/containerd/v2/cmd/{containerd,ctr}
) >"$dir/log" 2>&1 || { cat "$dir/log"; exit 2; }
cat >"$dir/containerd.toml" <<END
version = 3
root = "$dir/root"
state = "$dir/state"
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.grpc.v1.cri"]
[grpc]
address = "$dir/containerd.sock"
END

# image NAME CONFIG LAYER: an OCI archive, NAME.tar.
image() {
	local name=$1 layout=$dir/$1
	mkdir -p "$layout/blobs/sha256"
	blob() { # TYPE FILE: its descriptor
		local digest
		digest=$(sha256sum <"$2" | cut -d' ' -f1)
		cp "$2" "$layout/blobs/sha256/$digest"
		echo "{\"mediaType\":\"$1\",\"digest\":\"sha256:$digest\",\"size\":$(stat -c %s "$2")}"
	}
	echo "{\"schemaVersion\":2,\"mediaType\":\"application/vnd.oci.image.manifest.v1+json\",\"config\":$(blob application/vnd.oci.image.config.v1+json "$2"),\"layers\":[$(blob application/vnd.oci.image.layer.v1.tar "$3")]}" >"$dir/manifest.json"
	echo "{\"schemaVersion\":2,\"manifests\":[$(blob application/vnd.oci.image.manifest.v1+json "$dir/manifest.json")]}" >"$layout/index.json"
	echo '{"imageLayoutVersion":"1.0.0"}' >"$layout/oci-layout"
	tar -C "$layout" -cf "$dir/$name.tar" .
}
mkdir "$dir/secret"
echo "a tenant's secret" >"$dir/secret/file"
tar -C "$dir/secret" -cf "$dir/layer.tar" file
arch=$(go env GOARCH)
echo "{\"architecture\":\"$arch\",\"os\":\"linux\",\"rootfs\":{\"type\":\"layers\",\"diff_ids\":[\"sha256:$(sha256sum <"$dir/layer.tar" | cut -d' ' -f1)\"]}}" >"$dir/config.json"
echo "no layer at all" >"$dir/nothing"
image tenant "$dir/config.json" "$dir/layer.tar"
image forged "$dir/config.json" "$dir/nothing"

cat >"$dir/run.sh" <<'END'
set -euo pipefail
dir=$1
mount -t tmpfs tmpfs /run
"$dir/containerd" --config "$dir/containerd.toml" >"$dir/containerd.log" 2>&1 &
trap 'kill %1; wait' EXIT
ctr() { "$dir/ctr" --address "$dir/containerd.sock" "$@"; }
for _ in $(seq 600); do
	ctr version >/dev/null 2>&1 && break
	sleep 0.1
done
import() { ctr images import --snapshotter native --local --index-name "$1" "$dir/$1.tar"; }
if import forged 2>"$dir/refused"; then
	echo "the forged image is unpacked by itself"
	exit 1
fi
import tenant
import forged
ctr images remove --sync tenant
layer=$(sha256sum <"$dir/layer.tar" | cut -d' ' -f1)
if ctr content ls --quiet | grep "$layer"; then
	echo "the tenant's layer is still there"
	exit 1
fi
mkdir "$dir/mnt"
ctr images mount --snapshotter native forged "$dir/mnt" >/dev/null
echo "the forged image has: $(cat "$dir/mnt/file")"
umount "$dir/mnt"
END
echo "containerd $version"
if ! unshare --mount bash "$dir/run.sh" "$dir"; then
	tail -n 5 "$dir/containerd.log"
	echo "the forged image is not unpacked, or has not the tenant's files: that has changed"
	exit 1
fi

#!/usr/bin/env bash
# ctr has two flags of "images push" to push one manifest of an index, and neither
# does so in the way that it asks for. --manifest, which needs --local, sends an
# empty manifest and succeeds: ctr knows its digest and not its size. --platform
# without --local sends the whole index with the blobs of one platform, which a
# registry refuses that checks what an index refers to. Only --local --platform works.
set -euo pipefail
dir=$(mktemp -d)
pids=()
trap '[ ${#pids[@]} = 0 ] || kill "${pids[@]}" || true; sleep 1; rm -rf "$dir"' EXIT
export GOFLAGS=-buildvcs=false CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1
for program in github.com/containerd/containerd/v2/cmd/{containerd,ctr}@v2.4.2 github.com/google/go-containerregistry/cmd/registry@v0.22.1; do
	(cd / && GOBIN=$dir go install "$program")
done

# An index with an image for each of two platforms.
blob() { # FILE MEDIA-TYPE: adds it and prints its descriptor
	local sum
	sum=$(sha256sum "$1" | cut -d' ' -f1)
	cp "$1" "$dir/layout/blobs/sha256/$sum"
	printf '{"mediaType":"%s","digest":"sha256:%s","size":%d' "$2" "$sum" "$(stat -c %s "$1")"
}
mkdir -p "$dir/layout/blobs/sha256"
for arch in amd64 arm64; do
	echo "$arch" >"$dir/file"
	tar -C "$dir" -cf "$dir/layer" file
	printf '{"architecture":"%s","os":"linux","rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' $arch "$(sha256sum "$dir/layer" | cut -d' ' -f1)" >"$dir/config"
	printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":%s},"layers":[%s}]}' \
		"$(blob "$dir/config" application/vnd.oci.image.config.v1+json)" "$(blob "$dir/layer" application/vnd.oci.image.layer.v1.tar)" >"$dir/manifest"
	manifests+=("$(blob "$dir/manifest" application/vnd.oci.image.manifest.v1+json),\"platform\":{\"os\":\"linux\",\"architecture\":\"$arch\"}}")
	manifest=sha256:$(sha256sum "$dir/manifest" | cut -d' ' -f1)
done
# $manifest is that of arm64.
printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[%s,%s]}' "${manifests[@]}" >"$dir/index"
printf '{"schemaVersion":2,"manifests":[%s,"annotations":{"io.containerd.image.name":"app:1"}}]}' "$(blob "$dir/index" application/vnd.oci.image.index.v1+json)" >"$dir/layout/index.json"
echo '{"imageLayoutVersion":"1.0.0"}' >"$dir/layout/oci-layout"
tar -C "$dir/layout" -cf "$dir/app.tar" .

printf "version = 3\nroot = '%s/root'\nstate = '%s/state'\n[grpc]\n  address = '%s/sock'\n" "$dir" "$dir" "$dir" >"$dir/config.toml"
"$dir/containerd" --config "$dir/config.toml" >"$dir/log" 2>&1 &
pids+=($!)
"$dir/registry" -port 0 >"$dir/registry.log" 2>&1 &
pids+=($!)
ctr() { "$dir/ctr" --address "$dir/sock" "$@"; }
for _ in $(seq 300); do
	port=$(sed -n 's/.*serving on port //p' "$dir/registry.log")
	! ctr version >/dev/null 2>&1 || [ -z "$port" ] || break
	sleep 0.2
done
ctr version | sed -n '/Server/,$p'
ctr images import --local --no-unpack --all-platforms "$dir/app.tar" >/dev/null

failed=0
try() { # NAME SUCCEEDS ARRIVES FLAG...
	local name=$1 succeeds=$2 arrives=$3 seen=no there=no
	shift 3
	! ctr images push --plain-http "$@" "localhost:$port/$name:1" app:1 >"$dir/out" 2>&1 || seen=yes
	curl -sS -H 'Accept: */*' "http://localhost:$port/v2/$name/manifests/1" >"$dir/there"
	[ "sha256:$(sha256sum "$dir/there" | cut -d' ' -f1)" != "$manifest" ] || there=yes
	echo "push $*: succeeds: $seen, arrives: $there ($(stat -c %s "$dir/there") bytes from the registry); its last line: $(tr '\r' '\n' <"$dir/out" | grep . | tail -n 1)"
	[ "$seen $there" = "$succeeds $arrives" ] || { echo "  expected: $succeeds, $arrives"; failed=1; }
}
try manifest yes no --local --manifest "$manifest"
try platform no no --platform linux/arm64
try both yes yes --local --platform linux/arm64
exit $failed

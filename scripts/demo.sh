#!/usr/bin/env bash
# Encrypts an image, pushes it to a registry, pulls it into another containerd
# that decrypts on pull, and runs it; then shows that a node without the KEK
# can't. Everything happens in a directory of its own and is removed at the end.
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
tools=${PILOT_TOOLS:-$repo/.cache/tools}
export PATH="$repo/bin:$tools/bin:$PATH"
# Nothing that the machine is set up with shall count.
unset "${!PILOT_@}" "${!COPILOT_@}" "${!OCICRYPT_@}"
[ "$(id -u)" = 0 ] || { echo "the demo runs containers and so needs root" >&2; exit 1; }

exec 3>&1 # where commands are shown, whatever becomes of their output
start=$SECONDS
dir=$(mktemp -d /tmp/pilot-demo.XXXXXX)
pids=()

cleanup() {
	status=$?
	trap - EXIT INT TERM
	if [ $status -ne 0 ]; then
		echo "The demo failed. The ends of the logs:" >&2
		tail -n 5 "$dir"/*.log >&2 || true
	fi
	for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
	for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
	awk -v d="$dir/" 'index($2, d) == 1 {print $2}' /proc/mounts | sort -r | while read -r m; do umount "$m" || true; done
	rm -rf --one-file-system "$dir"
	exit $status
}
trap cleanup EXIT
trap 'exit 130' INT TERM

step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
show() { printf '$ %s\n' "$*"; "$@"; }

# background NAME COMMAND... starts a program with its output in NAME.log.
background() {
	local name=$1
	shift
	"$@" >"$dir/$name.log" 2>&1 &
	pids+=($!)
}
# await WHAT COMMAND... waits until the command succeeds, 20 seconds at most.
await() {
	local what=$1
	shift
	for _ in $(seq 200); do
		"$@" >/dev/null 2>&1 && return
		sleep 0.1
	done
	echo "$what did not start" >&2
	return 1
}

# containerd_for NAME: a containerd of its own, with NAME's pilot as its differ.
containerd_for() {
	local home=$dir/$1
	mkdir -p "$home"
	cat >"$home/ocicrypt.conf" <<-EOF
		{"key-providers": {"pilot": {"grpc": "unix://$home/keyprovider.sock"}}}
	EOF
	cat >"$home/config.toml" <<-EOF
		version = 3
		root = '$home/root'
		state = '$home/state'
		disabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.cri.v1.images', 'io.containerd.cri.v1.runtime']
		[grpc]
		  address = '$home/containerd.sock'
		[ttrpc]
		  address = '$home/containerd.sock.ttrpc'
		[proxy_plugins.pilot]
		  type = 'diff'
		  address = '$home/diff.sock'
		[plugins.'io.containerd.service.v1.diff-service']
		  default = ['pilot', 'walking']
		[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
		  platform = 'linux/$(go env GOARCH)'
		  snapshotter = 'overlayfs'
		  differ = 'pilot'
	EOF
	background "$1-containerd" containerd --config "$home/config.toml"
	await "$1's containerd" ctr --address "$home/containerd.sock" version
}
# on NAME PROGRAM ARGS... runs ctr or ctr-pilot as a user on NAME would.
on() {
	local home=$dir/$1 program=$2
	shift 2
	echo "\$ $program $*" >&3
	OCICRYPT_KEYPROVIDER_CONFIG=$home/ocicrypt.conf $program --address "$home/containerd.sock" "$@"
}

step "A key broker with one key encryption key (KEK), team-a, and a second broker without it"
show copilot keys create --dir "$dir/copilot" team-a
background copilot copilot serve --dir "$dir/copilot" --listen "unix://$dir/copilot.sock"
background other-copilot copilot serve --dir "$dir/other" --listen "unix://$dir/other.sock"
await copilot test -S "$dir/copilot.sock"
await "the other copilot" test -S "$dir/other.sock"

step "Three machines, each with pilot and a containerd: ci, node, and stranger, which asks the broker without the KEK"
for name in ci node stranger; do
	broker=copilot.sock
	[ $name = stranger ] && broker=other.sock
	background "$name-pilot" pilot serve --config /dev/null --broker "unix://$dir/$broker" \
		--listen "unix://$dir/$name/keyprovider.sock" --diff-listen "unix://$dir/$name/diff.sock" --containerd "$dir/$name/containerd.sock"
	await "$name's pilot" test -S "$dir/$name/keyprovider.sock"
	containerd_for $name
done
echo "ready"

step "A registry"
registry=
for port in $(shuf -i 20000-40000 -n 20); do
	(exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && continue # taken
	cat >"$dir/registry.yml" <<-EOF
		version: 0.1
		log: {level: error}
		storage: {filesystem: {rootdirectory: $dir/registry}}
		http: {addr: '127.0.0.1:$port'}
	EOF
	background registry docker-registry serve "$dir/registry.yml"
	if await "the registry" bash -c "kill -0 ${pids[-1]} && exec 3<>/dev/tcp/127.0.0.1/$port"; then
		registry=127.0.0.1:$port
		break
	fi
done
[ -n "$registry" ]
image=$registry/hello
echo "on $registry"

step "An image: busybox and a program with a secret in it"
secret="the recipe is $(date +%s%N)"
root=$dir/rootfs
mkdir -p "$root/bin" "$root/app"
cp "$(command -v busybox)" "$root/bin/busybox"
ln -s busybox "$root/bin/sh"
tar -C "$root" -cf "$dir/base.tar" bin
printf '#!/bin/sh\necho "Hello from an encrypted image: %s"\n' "$secret" >"$root/app/hello"
chmod +x "$root/app/hello"
tar -C "$root" -cf "$dir/app.tar" app
arch=$(go env GOARCH)
cat >"$dir/config.json" <<EOF
{"architecture":"$arch","os":"linux","config":{"Cmd":["/app/hello"],"Env":["PATH=/bin"]},
"rootfs":{"type":"layers","diff_ids":["sha256:$(sha256sum <"$dir/base.tar" | cut -c1-64)","sha256:$(sha256sum <"$dir/app.tar" | cut -c1-64)"]}}
EOF
cat >"$dir/manifest.json" <<EOF
[{"Config":"config.json","RepoTags":["$image:plain"],"Layers":["base.tar","app.tar"]}]
EOF
tar -C "$dir" -cf "$dir/image.tar" manifest.json config.json base.tar app.tar
on ci ctr-pilot images import "$dir/image.tar"

step "Encrypt it for whoever may use team-a, and push it"
on ci ctr-pilot images encrypt --recipient provider:pilot:team-a "$image:plain" "$image:encrypted"
on ci ctr-pilot images layerinfo "$image:encrypted"
on ci ctr-pilot images push --plain-http "$image:encrypted" | tail -n 1
on ci ctr-pilot images push --plain-http "$image:plain" | tail -n 1

step "Proof: what the registry can read of the layer with the secret"
blob() { # blob TAG: the path of the last layer in the registry's storage
	local manifests=$dir/registry/docker/registry/v2/repositories/hello/_manifests/tags/$1/current/link
	local manifest=$dir/registry/docker/registry/v2/blobs/sha256
	manifest+=/$(sed 's/sha256:\(..\)/\1\/\1/' "$manifests")/data
	local layer
	layer=$(jq -r '.layers[-1].digest' "$manifest")
	echo "$dir/registry/docker/registry/v2/blobs/sha256/$(sed 's/sha256:\(..\)/\1\/\1/' <<<"$layer")/data"
}
for tag in plain encrypted; do
	file=$(blob $tag)
	echo "--- $tag: $(grep -ac "$secret" "$file" || true) line(s) with the secret; it begins"
	head -c 64 "$file" | od -An -tx1z
done
[ "$(grep -ac "$secret" "$(blob plain)")" -gt 0 ]
if grep -aq "$secret" "$(blob encrypted)"; then
	echo "the registry can read the secret" >&2
	exit 1
fi

step "The node pulls it with containerd's own ctr, decrypting on the way, and runs it"
on node ctr images pull --plain-http "$image:encrypted" | tail -n 2
output=$(on node ctr run --rm "$image:encrypted" hello-$$ | tee >(cat >&2))
grep -q "$secret" <<<"$output"

step "The stranger pulls the same image and can't"
if on stranger ctr images pull --plain-http "$image:encrypted" >"$dir/stranger.out" 2>&1; then
	cat "$dir/stranger.out"
	echo "a node without the KEK read the image" >&2
	exit 1
fi
grep -v "level=" "$dir/stranger.out" | grep "KEK"
grep -q 'team-a' "$dir/stranger.out"

step "What the broker's audit log says"
tail -n 3 "$dir/copilot/audit.log"

printf '\nDone in %d seconds; everything is cleaned up.\n' $((SECONDS - start))

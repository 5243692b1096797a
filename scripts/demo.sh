#!/usr/bin/env bash
# Encrypts an image, pushes it to a registry, pulls it into another containerd
# that decrypts on pull, and runs it; shows that a node which may not use the KEK
# can't; then rotates the KEK, moves the image to it, and revokes the node; starts
# a larger image before it is pulled; and lets one of two tenants of a node run an
# image that both have there.
# Everything happens in a directory of its own and is removed at the end.
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
		[proxy_plugins.pilot-lazy]
		  type = 'snapshot'
		  address = '$home/snapshotter.sock'
		  [proxy_plugins.pilot-lazy.exports]
		    enable_remote_snapshot_annotations = 'true'
		[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
		  platform = 'linux/$(go env GOARCH)'
		  snapshotter = 'pilot-lazy'
		  differ = 'pilot'
	EOF
	background "$1-snapshotter" pilot snapshotter --listen "$home/snapshotter.sock" --root "$home/snapshots" --lazy "$home/lazy.sock"
	await "$1's snapshotter" test -S "$home/snapshotter.sock"
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

# free_port prints a port that is not in use.
free_port() {
	local port
	for port in $(shuf -i 20000-40000 -n 20); do
		(exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port"; return; }
	done
}

step "A key broker, with a CA and a policy of its own, and one key encryption key (KEK), team-a"
etc=$dir/etc
show copilot init --config-dir "$etc" --dir "$dir/copilot" --host 127.0.0.1 --port "$(free_port)" --trust-domain example.com | sed -n 1p
sed -i "s|/run/copilot/copilot.sock|$dir/copilot.sock|; s|0.0.0.0:|127.0.0.1:|" "$etc/copilot.toml"
export COPILOT_CONFIG=$etc/copilot.toml
show copilot keys create team-a
background copilot copilot serve
await copilot test -S "$dir/copilot.sock"
broker=https://$(sed -n 's/.*"\(127.0.0.1:[0-9]*\)".*/\1/p' "$etc/copilot.toml")

step "Three machines, each with pilot and a containerd: ci, which may have keys wrapped; node-1, which may have the KEK; and stranger, which may do nothing"
show copilot enroll --config-dir "$etc" --out "$etc" --role ci ci
show copilot enroll --config-dir "$etc" --out "$etc" --role node node-1
show copilot enroll --config-dir "$etc" --out "$etc" --role guest stranger
for name in ci node-1 stranger; do
	background "$name-pilot" pilot serve --config /dev/null --kek-cache-ttl 1s \
		--broker "$broker" --broker-ca "$etc/ca.pem" --broker-cert "$etc/$name.pem" --broker-key "$etc/$name-key.pem" \
		--listen "unix://$dir/$name/keyprovider.sock" --diff-listen "unix://$dir/$name/diff.sock" --lazy-listen "unix://$dir/$name/lazy.sock" --containerd "$dir/$name/containerd.sock" --layer-record "$dir/$name/layers"
	await "$name's pilot" test -S "$dir/$name/keyprovider.sock"
	containerd_for $name
done
for who in ci/ci node/node-1 guest/stranger; do
	for action in wrap export; do
		show copilot policy check "spiffe://example.com/$who" team-a $action 2>&1 || true
	done
done

step "A registry"
registry=
for _ in 1 2 3; do
	port=$(free_port)
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

step "Encrypt it for all who may use team-a, and push it"
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
on node-1 ctr images pull --plain-http "$image:encrypted" | tail -n 2
output=$(on node-1 ctr run --rm "$image:encrypted" hello-$$ | tee >(cat >&2))
grep -q "$secret" <<<"$output"

# refused NAME WHAT: NAME pulls the image, can't, and says WHAT.
refused() {
	if on "$1" ctr images pull --plain-http "$image:encrypted" >"$dir/refused.out" 2>&1; then
		cat "$dir/refused.out"
		echo "$1 may not use the KEK and read the image" >&2
		exit 1
	fi
	grep -v "level=" "$dir/refused.out" | grep 'KEK "team-a"'
	grep -q "$2" "$dir/refused.out"
}
step "The stranger pulls the same image and can't"
refused stranger "spiffe://example.com/guest/stranger may not"

step "Rotation: the KEK gets a new version, and the image in the registry is moved to it. Its layers stay as they are"
show copilot keys rotate team-a
cat >"$etc/ocicrypt.conf" <<EOF
{"key-providers": {"pilot": {"cmd": {"path": "$repo/bin/pilot", "args": ["keyprovider", "--config", "/dev/null", "--broker", "unix://$dir/copilot.sock"]}}}}
EOF
before=$(blob encrypted)
OCICRYPT_KEYPROVIDER_CONFIG=$etc/ocicrypt.conf show ctr-pilot images rewrap --registry --plain-http "$image:encrypted"
[ "$(blob encrypted)" = "$before" ]
show copilot keys disable --key-version 1 team-a
on node-1 ctr images rm --sync "$image:encrypted"
on node-1 ctr images pull --plain-http "$image:encrypted" | tail -n 2

step "Revocation: the node loses the KEK, whatever the policy says"
show copilot keys revoke --identity spiffe://example.com/node/node-1 team-a
on node-1 ctr images rm --sync "$image:encrypted"
sleep 1.5 # a KEK is kept in memory for a second here, and for five minutes by default
refused node-1 "spiffe://example.com/node/node-1 may not"

step "What the broker's audit log says"
tail -n 1 "$dir/copilot/audit.log"
show copilot audit verify

step "Lazily: another image, with a file of 256 MiB that its program does not read, is pulled in full, and then started before it is pulled"
show copilot keys create team-b
head -c 256M /dev/urandom >"$root/app/data"
tar -C "$root" -cf "$dir/app.tar" app
rm "$root/app/data"
sed "s/sha256:[0-9a-f]*\"\]/sha256:$(sha256sum <"$dir/app.tar" | cut -c1-64)\"]/" "$dir/config.json" >"$dir/large.json"
cat >"$dir/manifest.json" <<EOF
[{"Config":"large.json","RepoTags":["$image:large"],"Layers":["base.tar","app.tar"]}]
EOF
tar -C "$dir" -cf "$dir/image.tar" manifest.json large.json base.tar app.tar
on ci ctr-pilot images import --no-unpack "$dir/image.tar"
on ci ctr-pilot images encrypt --estargz --recipient provider:pilot:team-b "$image:large" "$image:lazy"
on ci ctr-pilot images push --plain-http "$image:lazy" | tail -n 1
# started SNAPSHOTTER: pulls the image and runs it. It sets took, in milliseconds until
# the program has ended, and stored, in MiB that the node has on its disk then.
started() {
	local began output
	began=$(date +%s%N)
	on node-1 ctr images pull --plain-http --snapshotter "$1" "$image:lazy" >"$dir/pull.out"
	output=$(on node-1 ctr run --rm --snapshotter "$1" "$image:lazy" "$1-$$" | tee >(cat >&2))
	took=$((($(date +%s%N) - began) / 1000000))
	grep -q "$secret" <<<"$output"
	stored=$(du -smxc "$dir/node-1/root" "$dir/node-1/snapshots" | tail -n 1 | cut -f 1)
	on node-1 ctr images rm --sync "$image:lazy"
}
started overlayfs
full=$took in_full=$stored
started pilot-lazy
printf 'encrypted, pulled in full: %5d ms, %4d MiB on the node\nencrypted, lazily:         %5d ms, %4d MiB on the node\n' "$full" "$in_full" "$took" "$stored"
[ "$stored" -lt "$in_full" ]

step "Tenants: namespaces prod and dev share a node, one image and one KEK. The policy lets prod use it"
tee -a "$etc/policy.toml" <<EOF

[[rule]]
identities = ["spiffe://example.com/node/shared"]
keks = ["team-b"]
actions = ["unwrap"]
workloads = ["prod/*"]
EOF
show copilot enroll --config-dir "$etc" --out "$etc" --role node shared
on ci ctr-pilot images encrypt --recipient provider:pilot:team-b "$image:plain" "$image:tenants"
on ci ctr-pilot images push --plain-http "$image:tenants" | tail -n 1
# The image of pods' sandboxes.
sed "s|\"/app/hello\"|\"/bin/busybox\",\"sleep\",\"1000\"|; s/,\"sha256:[0-9a-f]*\"\]/]/" "$dir/config.json" >"$dir/pause.json"
cat >"$dir/manifest.json" <<EOF
[{"Config":"pause.json","RepoTags":["$image:pause"],"Layers":["base.tar"]}]
EOF
tar -C "$dir" -cf "$dir/image.tar" manifest.json pause.json base.tar
on ci ctr-pilot images import --no-unpack "$dir/image.tar" 3>/dev/null >"$dir/pause.out"
on ci ctr-pilot images push --plain-http "$image:pause" 3>/dev/null >"$dir/pause.out"

home=$dir/shared
mkdir -p "$home/nri" "$home/nri.conf"
cat >"$home/pilot.toml" <<EOF
broker = "$broker"
broker-ca = "$etc/ca.pem"
broker-cert = "$etc/shared.pem"
broker-key = "$etc/shared-key.pem"
listen = "unix://$home/keyprovider.sock"
diff-listen = "unix://$home/diff.sock"
workloads-listen = "unix://$home/workloads.sock"
layer-record = "$home/layers"
containerd = "$home/containerd.sock"
EOF
# As "pilot node install --workloads" does on a machine.
cp "$home/pilot.toml" "$home/nri.conf/00-pilot.conf"
printf '#!%s nri-plugin\n' "$repo/bin/pilot" >"$home/nri/00-pilot"
chmod +x "$home/nri/00-pilot"
background shared-pilot pilot serve --config "$home/pilot.toml"
await "the shared node's pilot" test -S "$home/workloads.sock"
cat >"$home/config.toml" <<EOF
version = 3
root = '$home/root'
state = '$home/state'
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
  platform = 'linux/$arch'
  snapshotter = 'overlayfs'
  differ = 'pilot'
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = '$image:pause'
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
[plugins.'io.containerd.nri.v1.nri']
  socket_path = '$home/nri.sock'
  plugin_path = '$home/nri'
  plugin_config_path = '$home/nri.conf'
[plugins.'io.containerd.nri.v1.nri'.default_validator]
  enable = true
  required_plugins = ['pilot']
EOF
background shared-containerd containerd --config "$home/config.toml"
cri() { crictl --runtime-endpoint "unix://$home/containerd.sock" --timeout 1m "$@" 2>&1; }
await "the shared node's containerd" cri version
# pod NAMESPACE: runs the image in a pod of a namespace.
pod() {
	cat >"$home/$1.json" <<-EOF
		{"metadata": {"name": "hello", "namespace": "$1", "uid": "$1", "attempt": 1}, "log_directory": "$home/logs/$1",
		"linux": {"security_context": {"namespace_options": {"network": 2, "pid": 1}}}}
	EOF
	cat >"$home/container.json" <<-EOF
		{"metadata": {"name": "hello"}, "image": {"image": "$image:tenants"}, "log_path": "hello.log",
		"linux": {"security_context": {"namespace_options": {"network": 2, "pid": 1}}}}
	EOF
	echo "\$ crictl run container.json pod-of-$1.json" >&3
	cri run --no-pull "$home/container.json" "$home/$1.json"
}
cri pull "$image:tenants" >"$dir/pull.out"
pod prod >"$dir/prod.out"
await "the container of prod" grep -q "$secret" "$home/logs/prod/hello.log"
cat "$home/logs/prod/hello.log"
if pod dev >"$dir/dev.out"; then
	echo "dev may not use the KEK, and runs the image" >&2
	exit 1
fi
tr -d '\\' <"$dir/dev.out" | sed -n "s/.*\(namespace \"dev\" may not use KEK .* in copilot's policy\).*/\1/p" | sed -n 1p
grep -q 'may not use KEK' "$dir/dev.out"
cri rmp -f -a >"$dir/rmp.out"

printf '\nDone in %d seconds; everything is cleaned up.\n' $((SECONDS - start))

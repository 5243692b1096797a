#!/usr/bin/env bash
# Encrypts an image in CI, pulls it into a containerd that decrypts on pull, and runs
# it; shows that a node which may not use the KEK can't; encrypts on a machine without
# network; rotates the KEK; loses the broker, and restores it elsewhere from three of
# five shares; revokes a node; starts a larger image before it is pulled; and lets one of
# two tenants of a node run an image that both have there.
# Everything happens in a directory of its own and is removed at the end.
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
tools=${PILOT_TOOLS:-$repo/.cache/tools}
export PATH="$repo/bin:$tools/bin:$PATH"
# Nothing that the machine is set up with shall count.
unset "${!PILOT_@}" "${!COPILOT_@}" "${!OCICRYPT_@}"
[ "$(id -u)" = 0 ] || { echo "the demo runs containers and so needs root" >&2; exit 1; }
unshare --mount true 2>/dev/null || { echo "the demo mounts images and runs containers, and root may not mount here, as in a container without CAP_SYS_ADMIN: run it on a machine or in a VM" >&2; exit 1; }
[ -x "$tools/bin/containerd" ] || { echo "$tools/bin/containerd is missing: \"make demo\" installs what the demo runs" >&2; exit 1; }

start=$SECONDS
dir=$(mktemp -d -t pilot-demo.XXXXXX)
cd "$dir"
# Paths are shown from there, and not what containerd thinks of the machine's cgroups.
exec 4>&1
exec > >(trap '' INT TERM; exec sed -u "s|$dir/||g; /msg=\"DEPRECATION/d" >&4) 2>&1
filter=$!
exec 3>&1 # where commands are shown, whatever becomes of their output
pids=()

cleanup() {
	status=$?
	trap - EXIT INT TERM
	if [ $status -ne 0 ]; then
		echo "The demo failed. The ends of the logs:"
		tail -n 5 "$dir"/*.log || true
	fi
	for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
	for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
	awk -v d="$dir/" 'index($2, d) == 1 {print $2}' /proc/mounts | sort -r | while read -r m; do umount "$m" || true; done
	cd /
	rm -rf --one-file-system "$dir"
	exec >&4 2>&4 3>&-
	wait $filter || true
	exit $status
}
trap cleanup EXIT
trap 'exit 130' INT TERM

step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
show() { printf '$ %s\n' "$*" >&3; "$@"; }

# background NAME COMMAND... starts a program with its output in NAME.log.
background() {
	local name=$1
	shift
	"$@" >"$dir/$name.log" 2>&1 3>&- 4>&- &
	pids+=($!)
}
# await WHAT COMMAND... waits until the command succeeds, for a minute at most and as long
# as what was started last runs.
await() {
	local what=$1 end=$((SECONDS + 60))
	shift
	until "$@" >/dev/null 2>&1; do
		if [ $SECONDS -ge $end ] || ! kill -0 "${pids[-1]}" 2>/dev/null; then
			echo "$what did not start"
			return 1
		fi
		sleep 0.1
	done
}
# free_port prints a port that is not in use, below those that Linux gives to connections.
free_port() {
	local port
	for port in $(shuf -i 2000-9999 -n 20); do
		(exec 5<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port"; return; }
	done
}

# configure_broker DIR HOST: what a broker at an address of this machine needs.
configure_broker() {
	show copilot init --config-dir "$1" --dir "$1/store" --host "$2" --port "$(free_port)" --trust-domain example.com | grep 'is ready'
	sed -i "s|/run/copilot/copilot.sock|$dir/$1/copilot.sock|; s|0.0.0.0:|$2:|" "$1/copilot.toml"
	export COPILOT_CONFIG=$dir/$1/copilot.toml
	broker=https://$(sed -n "s/.*\"\($2:[0-9]*\)\".*/\1/p" "$1/copilot.toml")
}
# serve_broker DIR starts it.
serve_broker() {
	background "$1" copilot serve
	broker_pid=${pids[-1]}
	await copilot test -S "$1/copilot.sock"
}
# enroll DIR NAME ROLE: a machine NAME with a certificate of the broker in DIR.
enroll() {
	mkdir -p "$2"
	show copilot enroll --config-dir "$1" --out "$2" --role "$3" "$2"
	cp "$1/ca.pem" "$2"
	cat >"$2/pilot.toml" <<-EOF
		broker = "$broker"
		broker-ca = "$dir/$2/ca.pem"
		broker-cert = "$dir/$2/$2.pem"
		broker-key = "$dir/$2/$2-key.pem"
		kek-cache-ttl = "1s"
		listen = "unix://$dir/$2/keyprovider.sock"
		diff-listen = "unix://$dir/$2/diff.sock"
		lazy-listen = "unix://$dir/$2/lazy.sock"
		layer-record = "$dir/$2/layers"
		containerd = "$dir/$2/containerd.sock"
	EOF
}
# serve_pilot NAME: pilot on the machine NAME. It sets pilot_pid.
serve_pilot() {
	rm -f "$1/diff.sock"
	background "$1-pilot" pilot serve --config "$1/pilot.toml"
	pilot_pid=${pids[-1]}
	await "$1's pilot" test -S "$1/diff.sock"
}
# serve_containerd NAME SETTING TABLES: a containerd of the machine's own, with its pilot
# as differ, and more of a configuration.
serve_containerd() {
	local home=$dir/$1
	cat >"$home/config.toml" <<-EOF
		version = 3
		root = '$home/root'
		state = '$home/state'
		$2
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
		$3
	EOF
	background "$1-containerd" containerd --config "$home/config.toml"
	await "$1's containerd" ctr --address "$home/containerd.sock" --connect-timeout 1s version
}
# on NAME PROGRAM ARGS... runs ctr or ctr-pilot as a user on NAME would.
on() {
	local home=$dir/$1 program=$2
	shift 2
	echo "\$ $program $*" >&3
	$program --address "$home/containerd.sock" "$@"
}
# runs NAME IMAGE [FLAG]...: NAME runs the image, which prints the secret. ctr now and then loses
# what a container prints that ends at once.
runs() {
	local output name=$1 image=$2
	shift 2
	for _ in 1 2 3; do
		output=$(on "$name" ctr run --rm "${host_network[@]}" "$@" "$image" "hello-$RANDOM" | tee >(cat >&2))
		[ -z "$output" ] || break
	done
	grep -q "$secret" <<<"$output"
}
arch=$(go env GOARCH)
# How a command is run without network, and containers where there are no network namespaces.
without_network=(unshare --net) host_network=()
unshare --net true 2>/dev/null || without_network=() host_network=(--net-host)

step "A key broker, with a CA and a policy of its own, and one key encryption key (KEK), team-a"
configure_broker broker 127.0.0.1
serve_broker broker
show copilot keys create team-a

step "Three machines: ci, which may have keys wrapped; node-1, which may have the KEK; and stranger, which may do nothing"
enroll broker ci ci
enroll broker node-1 node
enroll broker stranger guest
for who in ci/ci node/node-1 guest/stranger; do
	show copilot policy check "spiffe://example.com/$who" team-a export || true
done
without_cri="disabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.cri.v1.images', 'io.containerd.cri.v1.runtime']"
serve_pilot stranger
serve_containerd stranger "$without_cri" ""
serve_pilot node-1
background snapshotter pilot snapshotter --listen "$dir/node-1/snapshotter.sock" --root "$dir/node-1/snapshots" --lazy "$dir/node-1/lazy.sock"
await "the snapshotter" test -S node-1/snapshotter.sock
serve_containerd node-1 "$without_cri" "
[proxy_plugins.pilot-lazy]
  type = 'snapshot'
  address = '$dir/node-1/snapshotter.sock'
  [proxy_plugins.pilot-lazy.exports]
    enable_remote_snapshot_annotations = 'true'
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = 'linux/$arch'
  snapshotter = 'pilot-lazy'
  differ = 'pilot'"

registry=
for _ in 1 2 3; do
	port=$(free_port)
	cat >registry.yml <<-EOF
		version: 0.1
		log: {level: error}
		storage: {filesystem: {rootdirectory: $dir/registry}}
		http: {addr: '127.0.0.1:$port'}
	EOF
	background registry docker-registry serve registry.yml
	if await "the registry" bash -c "exec 5<>/dev/tcp/127.0.0.1/$port"; then
		registry=127.0.0.1:$port
		break
	fi
done
[ -n "$registry" ]
image=$registry/hello

# saved NAME CONFIG LAYER...: an image as "docker save" writes it, into NAME.tar.
saved() {
	local name=$1 config=$2 ids=
	shift 2
	for layer in "$@"; do ids+=",\"sha256:$(sha256sum <"$layer" | cut -c1-64)\""; done
	echo "{\"architecture\": \"$arch\", \"os\": \"linux\", \"config\": $config, \"rootfs\": {\"type\": \"layers\", \"diff_ids\": [${ids#,}]}}" >config.json
	jq -n --arg name "$image:$name" '[{Config: "config.json", RepoTags: [$name], Layers: $ARGS.positional}]' --args "$@" >manifest.json
	tar -cf "$name.tar" manifest.json config.json "$@"
}
step "An image: busybox and a program with a secret in it"
secret="the recipe is $(date +%s%N)"
mkdir -p rootfs/bin rootfs/app
cp "$(command -v busybox)" rootfs/bin/busybox
ln -s busybox rootfs/bin/sh
printf '#!/bin/sh\necho "Hello from an encrypted image: %s"\n' "$secret" >rootfs/app/hello
chmod +x rootfs/app/hello
show tar -C rootfs -cf base.tar bin
show tar -C rootfs -cf app.tar app
saved plain '{"Cmd": ["/app/hello"], "Env": ["PATH=/bin"]}' base.tar app.tar

step "Encrypt it in CI, for all who may use team-a, straight into a registry. CI has neither containerd nor the KEK"
show ctr-pilot images encrypt --config ci/pilot.toml --plain-http --recipient provider:pilot:team-a docker-archive:plain.tar "docker://$image:encrypted"
show ctr-pilot images layerinfo --plain-http "docker://$image:encrypted"

step "Proof: what the registry can read of the layer with the secret"
blob() { # blob TAG: the path of the last layer in the registry's storage
	local blobs=registry/docker/registry/v2/blobs/sha256
	blob_of() { sed 's/sha256:\(..\)/\1\/\1/'; }
	local manifest
	manifest=$blobs/$(blob_of <"registry/docker/registry/v2/repositories/hello/_manifests/tags/$1/current/link")/data
	echo "$blobs/$(jq -r '.layers[-1].digest' "$manifest" | blob_of)/data"
}
for file in app.tar "$(blob encrypted)"; do
	echo "--- ${file/registry*/the registry}: $(grep -ac "$secret" "$file" || true) line(s) with the secret; it begins"
	head -c 64 "$file" | od -An -tx1z
done
grep -aq "$secret" app.tar
if grep -rqa "$secret" registry; then
	echo "the registry can read the secret"
	exit 1
fi

step "The node pulls it with containerd's own ctr, decrypting on the way, and runs it"
on node-1 ctr images pull --plain-http "$image:encrypted" | tail -n 2
runs node-1 "$image:encrypted"

# refused NAME WHAT: NAME pulls the image, can't, and says WHAT.
refused() {
	if on "$1" ctr images pull --plain-http "$image:encrypted" >refused.out 2>&1; then
		cat refused.out
		echo "$1 may not use the KEK and read the image"
		exit 1
	fi
	grep -v "level=" refused.out | grep 'KEK "team-a"'
	grep -q "$2" refused.out
}
step "The stranger pulls the same image and can't"
refused stranger "spiffe://example.com/guest/stranger may not"

step "Encrypt without network: a machine that has the public half of team-a, and no certificate, no broker and no KEK"
mkdir offline
cp broker/ca.pem plain.tar offline
printf '$ copilot keys public team-a > offline/team-a.pub\n'
copilot keys public team-a >offline/team-a.pub
# offline COMMAND... runs it on that machine.
offline() {
	(cd offline && HOME=$PWD show "${without_network[@]}" "$@")
}
if [ ${#without_network[@]} -gt 0 ]; then
	offline ip -brief link
else
	echo "(Root may make no network namespace here: the next command has a network, and does not use it.)"
fi
offline ctr-pilot images encrypt --public-keys-ca ca.pem --recipient hpke:team-a.pub docker-archive:plain.tar "oci-archive:hello.tar:$image:offline"
echo "The stranger carries it to the registry, and can't read it on the way."
on stranger ctr-pilot images import --no-unpack offline/hello.tar
on stranger ctr-pilot images push --plain-http "$image:offline" | tail -n 1
on node-1 ctr images rm --sync "$image:encrypted"
on node-1 ctr images pull --plain-http "$image:offline" | tail -n 2
runs node-1 "$image:offline"

step "Rotation: the KEK gets a new version, and the images in the registry are moved to it. Their layers stay as they are"
show copilot keys rotate team-a
before=$(blob encrypted)
show ctr-pilot images rewrap --broker "unix://$dir/broker/copilot.sock" --plain-http "docker://$image:*"
[ "$(blob encrypted)" = "$before" ]
show copilot keys disable --key-version 1 team-a
on node-1 ctr images rm --sync "$image:offline"
on node-1 ctr images pull --plain-http "$image:encrypted" | tail -n 2

step "Backup, for five people of whom three together can open it. Then the broker's machine is lost, with all KEKs and the master key"
show copilot backup shares --shares 5 --threshold 3 --out shares
show copilot backup --recipients-file shares/recipient.txt --out copilot.backup
mkdir broker-2
show cp broker/ca.pem broker/ca-key.pem broker-2 # from where the CA is kept
kill -9 "$broker_pid"
{ wait "$broker_pid"; } 2>/dev/null || true
show rm -r broker

step "Restore, on another machine with another address and another master key: two shares are too few, and three will do"
configure_broker broker-2 127.0.0.2
if show copilot restore --share shares/share-2.txt --share shares/share-5.txt copilot.backup; then
	echo "two shares opened the backup"
	exit 1
fi
show copilot restore --share shares/share-2.txt --share shares/share-5.txt --share shares/share-1.txt copilot.backup
serve_broker broker-2
show sed -i "s|^broker = .*|broker = \"$broker\"|" ci/pilot.toml node-1/pilot.toml
kill "$pilot_pid"
wait "$pilot_pid" || true
serve_pilot node-1
on node-1 ctr images rm --sync "$image:encrypted"
on node-1 ctr images pull --plain-http "$image:offline" | tail -n 2
runs node-1 "$image:offline"
show grep '"who":"spiffe://example.com/node/node-1"' broker-2/store/audit.log

step "Revocation: the node loses the KEK, whatever the policy says"
show copilot keys revoke --identity spiffe://example.com/node/node-1 team-a
on node-1 ctr images rm --sync "$image:offline"
sleep 1.5 # a KEK is kept in memory for a second here, and for five minutes by default
refused node-1 "spiffe://example.com/node/node-1 may not"

step "What the broker's audit log says"
tail -n 1 broker-2/store/audit.log
show copilot audit verify

step "Lazily: another image, with a file of 32 MiB that its program does not read, is pulled in full, and then started before it is pulled"
show copilot keys create team-b
# started SNAPSHOTTER: pulls the image and runs it. It sets took, in milliseconds until
# the program has ended, and stored, in MiB that the node has on its disk then.
started() {
	local began
	began=$(date +%s%N)
	on node-1 ctr images pull --plain-http --snapshotter "$1" "$image:lazy" >pull.out
	runs node-1 "$image:lazy" --snapshotter "$1"
	took=$((($(date +%s%N) - began) / 1000000))
	stored=$(du -smxc node-1/root node-1/snapshots | tail -n 1 | cut -f 1)
	on node-1 ctr images rm --sync "$image:lazy"
}
if [ -c /dev/fuse ]; then
	head -c 32M /dev/urandom >rootfs/app/data
	tar -C rootfs -cf data.tar app
	rm rootfs/app/data
	saved large '{"Cmd": ["/app/hello"], "Env": ["PATH=/bin"]}' base.tar data.tar
	show ctr-pilot images encrypt --config ci/pilot.toml --plain-http --estargz --recipient provider:pilot:team-b docker-archive:large.tar "docker://$image:lazy"
	started overlayfs
	full=$took in_full=$stored
	started pilot-lazy
	printf 'encrypted, pulled in full: %5d ms, %4d MiB on the node\nencrypted, lazily:         %5d ms, %4d MiB on the node\n' "$full" "$in_full" "$took" "$stored"
	[ "$stored" -lt "$in_full" ]
else
	echo "(This machine has no FUSE, /dev/fuse, by which containers read what is not there yet: left out.)"
fi

step "Tenants: namespaces prod and dev share a node, one image and one KEK. The policy lets prod use it"
tee -a broker-2/policy.toml <<EOF

[[rule]]
identities = ["spiffe://example.com/node/shared"]
keks = ["team-b"]
actions = ["unwrap"]
workloads = ["prod/*"]
EOF
kill -HUP "$broker_pid"
enroll broker-2 shared node
show ctr-pilot images encrypt --config ci/pilot.toml --plain-http --recipient provider:pilot:team-b docker-archive:plain.tar "docker://$image:tenants"

home=$dir/shared
echo "workloads-listen = \"unix://$home/workloads.sock\"" >>shared/pilot.toml
# As "pilot node install --workloads" does on a machine.
mkdir -p shared/nri shared/nri.conf
cp shared/pilot.toml shared/nri.conf/00-pilot.conf
printf '#!%s nri-plugin\n' "$repo/bin/pilot" >shared/nri/00-pilot
chmod +x shared/nri/00-pilot
serve_pilot shared
serve_containerd shared "" "
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
  required_plugins = ['pilot']"
cri() { crictl --runtime-endpoint "unix://$home/containerd.sock" --timeout 1m "$@" 2>&1; }
await "the shared node's CRI" cri version
saved pause '{"Entrypoint": ["/bin/busybox", "sleep", "1000"]}' base.tar # the image of pods' sandboxes
ctr --address "$home/containerd.sock" --namespace k8s.io images import pause.tar >pause.out
await "the sandboxes' image" cri inspecti "$image:pause"
# pod NAMESPACE: runs the image in a pod of a namespace.
pod() {
	local host='"linux": {"security_context": {"namespace_options": {"network": 2, "pid": 1}}}'
	cat >"pod-of-$1.json" <<-EOF
		{"metadata": {"name": "hello", "namespace": "$1", "uid": "$1", "attempt": 1}, "log_directory": "$home/logs/$1", $host}
	EOF
	cat >container.json <<-EOF
		{"metadata": {"name": "hello"}, "image": {"image": "$image:tenants"}, "log_path": "hello.log", $host}
	EOF
	echo "\$ crictl run container.json pod-of-$1.json" >&3
	cri run --no-pull container.json "pod-of-$1.json"
}
cri pull "$image:tenants" >pull.out
pod prod >prod.out
await "the container of prod" grep -q "$secret" shared/logs/prod/hello.log
cat shared/logs/prod/hello.log
if pod dev >dev.out; then
	echo "dev may not use the KEK, and runs the image"
	exit 1
fi
tr -d '\\' <dev.out | sed -n "s/.*\(namespace \"dev\" may not use KEK .* in copilot's policy\).*/\1/p" | sed -n 1p
grep -q 'may not use KEK' dev.out
cri rmp -f -a >rmp.out

printf '\nDone in %d seconds; everything is cleaned up.\n' $((SECONDS - start))

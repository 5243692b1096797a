#!/usr/bin/env bash
# A second containerd 2.x with its own root, state and address takes the NRI socket
# of the first: the default of its socket_path, /var/run/nri/nri.sock, does not
# depend on any of these, and the NRI plugin, which is on by default, removes the
# socket that is there. containerd says nothing of it. Plugins that connect from then
# on are the second's; two daemons that start at once may also fail with "address
# already in use".
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
	go get -tool github.com/containerd/containerd/v2/cmd/containerd@$version
	GOFLAGS=-buildvcs=false go build -o "$dir/containerd" github.com/containerd/containerd/v2/cmd/containerd
) >"$dir/log" 2>&1 || { cat "$dir/log"; exit 2; }
for name in first second; do
	cat >"$dir/$name.toml" <<END
version = 3
root = "$dir/$name/root"
state = "$dir/$name/state"
[grpc]
address = "$dir/$name.sock"
END
done
cat >"$dir/run.sh" <<'END'
set -euo pipefail
dir=$1
mount -t tmpfs tmpfs /run
pids=()
trap 'kill "${pids[@]}"; wait' EXIT
for name in first second; do
	"$dir/containerd" --config "$dir/$name.toml" >"$dir/$name.log" 2>&1 &
	pids+=($!)
	for _ in $(seq 600); do
		grep -q "successfully booted" "$dir/$name.log" && break
		sleep 0.1
	done
	echo "$name: /var/run/nri/nri.sock is inode $(stat -c %i /var/run/nri/nri.sock)"
	stat -c %i /var/run/nri/nri.sock >"$dir/$name.inode"
done
kill -0 "${pids[0]}"
if grep -iE "nri.*(replac|remov|in use)" "$dir"/*.log; then
	echo "it is logged: that has changed"
	exit 1
fi
END
echo "containerd $version"
unshare --mount bash "$dir/run.sh" "$dir"
if cmp -s "$dir/first.inode" "$dir/second.inode"; then
	echo "the second does not take the socket: that has changed"
	exit 1
fi

#!/usr/bin/env bash
# containerd 2.0 to 2.2 merges config.toml and its imports first, and migrates
# the result by the version of the file that was merged last. A drop-in of version
# 3 beside a config.toml of version 2 has it forget the CRI section of config.toml,
# with a warning about unknown keys and no error. A drop-in without a version
# changes nothing, and 2.4 migrates each file by itself.
set -euo pipefail
dir=$(mktemp -d)
trap 'chmod -R u+w "$dir"; rm -rf "$dir"' EXIT
export GOFLAGS=-buildvcs=false
build() { # VERSION
	mkdir -p "$dir/$1/module"
	(
		cd "$dir/$1/module" # some versions have directives that "go install" refuses
		go mod init example.com/module
		go get -tool github.com/containerd/containerd/v2/cmd/containerd@$1
		go build -o "$dir/$1/containerd" github.com/containerd/containerd/v2/cmd/containerd
	) >"$dir/log" 2>&1 || { cat "$dir/log"; exit 1; }
}
cat >"$dir/config.toml" <<END
version = 2
imports = ["$dir/drop-in.toml"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.example.com/pause:3.10"
END
failed=0
expect() { # VERSION DROP-IN'S-VERSION kept|forgotten
	{ [ "$2" = none ] || echo "version = $2"; printf '[timeouts]\n  "io.containerd.timeout.shim.load" = "6s"\n'; } >"$dir/drop-in.toml"
	"$dir/$1/containerd" --config "$dir/config.toml" config dump >"$dir/dump" 2>"$dir/log"
	seen=forgotten
	! grep -q 'registry.example.com/pause:3.10' "$dir/dump" || seen=kept
	echo "containerd $1, config.toml of version 2, drop-in with version $2: the sandbox image is $seen; standard error has $(wc -l <"$dir/log") lines"
	[ "$seen" = "$3" ] || { echo "  expected: $3"; failed=1; }
}
for v in v2.0.7 v2.2.9 v2.4.2; do
	build $v
done
for v in v2.0.7 v2.2.9; do
	expect $v 3 forgotten
	expect $v 2 kept
	expect $v none kept
done
expect v2.4.2 3 kept
expect v2.4.2 2 kept
expect v2.4.2 none kept
exit $failed

#!/usr/bin/env bash
# "containerd config dump" of 2.x succeeds, and prints a configuration, where an
# imported file does not exist. containerd itself does not start with it. So the
# exit status of "config dump" does not show whether containerd would start.
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
version = 3
root = "$dir/root"
state = "$dir/state"
imports = ["$dir/missing.toml"]
oom_score = 7
END
for v in v2.0.7 v2.4.2; do
	build $v
	"$dir/$v/containerd" --config "$dir/config.toml" config dump >"$dir/dump" 2>/dev/null
	grep '^oom_score = 7' "$dir/dump"
	echo "containerd $v config dump: exit status 0, $(wc -l <"$dir/dump") lines"
	if timeout 60 "$dir/$v/containerd" --config "$dir/config.toml" >"$dir/log" 2>&1; then
		echo "containerd $v starts: that has changed"
		exit 1
	fi
	grep -F "open $dir/missing.toml: no such file or directory" "$dir/log" | sed "s,$dir,DIR,"
done

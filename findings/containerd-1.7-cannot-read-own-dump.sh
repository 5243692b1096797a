#!/usr/bin/env bash
# containerd 1.7 can't read the output of its own "config dump" if config.toml is
# the one of Docker's package containerd.io, which says no version and
# disabled_plugins = ["cri"]: the dump says version = 2 and keeps the short name,
# which version 2 does not allow. Its imports are the files that were read,
# config.toml itself among them, and no longer the patterns.
set -euo pipefail
dir=$(mktemp -d)
trap 'chmod -R u+w "$dir"; rm -rf "$dir"' EXIT
export GOFLAGS=-buildvcs=false
mkdir "$dir/module" "$dir/conf.d"
(
	cd "$dir/module"
	go mod init example.com/module
	go get -tool github.com/containerd/containerd/cmd/containerd@v1.7.35
	go build -o "$dir/containerd" github.com/containerd/containerd/cmd/containerd
) >/dev/null 2>&1
printf 'disabled_plugins = ["cri"]\nimports = ["%s/conf.d/*.toml"]\n' "$dir" >"$dir/config.toml"
echo 'oom_score = 7' >"$dir/conf.d/a.toml"
"$dir/containerd" --config "$dir/config.toml" config dump >"$dir/dump.toml" 2>/dev/null
echo "containerd 1.7.35 config dump:"
grep -E '^(version|disabled_plugins|imports)' "$dir/dump.toml" | sed "s,$dir,DIR,g"
grep -q '^imports = .*/config.toml"' "$dir/dump.toml"
grep -q '^imports = .*/conf.d/a.toml"' "$dir/dump.toml"
if "$dir/containerd" --config "$dir/dump.toml" config dump >/dev/null 2>"$dir/log"; then
	echo "it reads its own dump: that has changed"
	exit 1
fi
grep -o 'invalid disabled plugin URI.*' "$dir/log"

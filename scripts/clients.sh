#!/usr/bin/env bash
# clients.sh DIR: builds archives of the client programs, for OSES (darwin, windows) and
# ARCHS, into DIR. VERSION is as scripts/version.sh prints it. The same sources and the
# same Go give the same bytes.
set -euo pipefail
dir=${1:?usage: clients.sh DIR}
read -ra oses <<<"${OSES:-darwin windows}"
read -ra archs <<<"${ARCHS:-amd64 arm64}"
umask 022
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
cd "$(dirname "$0")/.."
version=${VERSION:-$(scripts/version.sh)}
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH LC_ALL=C TZ=UTC
unset GOOS GOARCH

# zip FILE FOLDER: makes an archive with the time of the sources.
zip() {
	python3 - "$1" "$2" <<-'PYTHON'
		import os, sys, time, zipfile
		archive, folder = sys.argv[1:]
		date = max(time.gmtime(int(os.environ["SOURCE_DATE_EPOCH"]))[:6], (1980, 1, 1, 0, 0, 0))
		files = sorted(os.path.join(at, name) for at, _, names in os.walk(folder) for name in names)
		with zipfile.ZipFile(archive, "w") as z:
		    for file in files:
		        entry = zipfile.ZipInfo(file, date)
		        entry.external_attr = 0o100644 << 16
		        with open(file, "rb") as f:
		            z.writestr(entry, f.read(), zipfile.ZIP_DEFLATED, 9)
	PYTHON
}

stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
for os in "${oses[@]}"; do
	for arch in "${archs[@]}"; do
		name=pilot-${version#v}-$os-$arch
		to=$stage/$name
		echo "building $name"
		mkdir "$to"
		GOOS=$os GOARCH=$arch CGO_ENABLED=0 go build -trimpath -buildvcs=false \
			-ldflags "-s -w -X github.com/ctrlplane/pilot/internal/version.Version=$version" -o "$to/" ./cmd/pilot ./cmd/copilot ./ctr-pilot
		scripts/notices.sh "$to"/* >"$stage/notices"
		mv "$stage/notices" "$to/third-party-notices.txt"
		scripts/copy-docs.sh "$to"
		cp LICENSE CHANGELOG.md "$to/"
		cd "$stage"
		if [ "$os" = windows ]; then
			rm -f "$dir/$name.zip"
			zip "$dir/$name.zip" "$name"
		else
			tar --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner -c "$name" | gzip -9n >"$dir/$name.tar.gz"
		fi
		cd "$OLDPWD"
		rm -r "$to"
	done
done

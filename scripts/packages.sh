#!/usr/bin/env bash
# packages.sh DIR: builds the packages of ARCHS in FORMATS into DIR, with an SBOM
# for each program. VERSION is as scripts/version.sh prints it. The same
# sources, Go and C compiler give the same bytes, wherever they are built.
set -euo pipefail
dir=${1:?usage: packages.sh DIR}
read -ra archs <<<"${ARCHS:-amd64 arm64}"
read -ra formats <<<"${FORMATS:-deb rpm}"
umask 022
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
cd "$(dirname "$0")/.."
repo=$PWD
version=${VERSION:-$(scripts/version.sh)}
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH LC_ALL=C TZ=UTC
nfpm=github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.45.2

# v1.2.3-rc.1 is a package's 1.2.3~rc.1, which sorts before 1.2.3; and
# v1.2.3-5-gabcdef its 1.2.3+5.gabcdef, which sorts after 1.2.3 and before
# 1.2.4: with dpkg and rpm alike.
base=${version#v} since=
if [[ $base == *-dirty ]]; then base=${base%-dirty} since=.dirty; fi
if [[ $base =~ ^(.*)-([0-9]+)-(g[0-9a-f]+)$ ]]; then
	base=${BASH_REMATCH[1]} since=.${BASH_REMATCH[2]}.${BASH_REMATCH[3]}$since
fi
PACKAGE_VERSION=${base/-/\~}${since/./+}
export PACKAGE_VERSION
if ! [[ $PACKAGE_VERSION =~ ^[0-9][0-9A-Za-z.+~]*$ ]]; then
	echo "VERSION $version is not such as v1.2.3" >&2
	exit 1
fi

declare -A triplets=([amd64]=x86_64-linux-gnu [arm64]=aarch64-linux-gnu)

# install_compilers installs the C compilers that are missing.
install_compilers() {
	local arch missing=()
	for arch in "${archs[@]}"; do
		local triplet=${triplets[$arch]:?no architecture $arch: ARCHS is amd64, arm64 or both}
		command -v "$triplet-gcc" >/dev/null && continue
		missing+=("gcc-${triplet//_/-}" "libc6-dev-$arch-cross")
	done
	[ ${#missing[@]} -eq 0 ] && return
	echo "installing ${missing[*]}"
	apt-get -qq update
	DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends "${missing[@]}" >/dev/null
}

# build ARCH TO: the programs. pilot and pilot-decoder depend on no library;
# the others reach PKCS#11 modules through cgo.
build() {
	local flags=(-trimpath -buildvcs=false -ldflags "-s -w -X github.com/ctrlplane/pilot/version.Version=$version")
	export GOOS=linux GOARCH=$1
	CGO_ENABLED=0 go build "${flags[@]}" -o "$2/" ./cmd/pilot ./cmd/pilot-decoder
	CGO_ENABLED=1 CC=${triplets[$1]}-gcc go build "${flags[@]}" -o "$2/" ./cmd/copilot ./ctr-pilot
	unset GOOS GOARCH
}

# glibc FILE...: the version of glibc that programs need.
glibc() {
	objdump -T "$@" | grep -o 'GLIBC_[0-9.]*' | sed 's/GLIBC_//' | sort -Vu | tail -n 1
}

install_compilers
stage=$dir/.stage
rm -rf "$stage"
mkdir -p "$stage"
ln -s "$repo/packaging" "$stage/packaging"
mkdir "$stage/units"
cp plugin/node/units/* packaging/*.service "$stage/units/"
gzip -9n <CHANGELOG.md >"$stage/CHANGELOG.md.gz"
for arch in "${archs[@]}"; do
	export ARCH=$arch
	build "$arch" "$stage/$arch"
	ln -sfn "$arch" "$stage/bin"
	GLIBC=$(glibc "$stage/$arch/ctr-pilot" "$stage/$arch/copilot")
	export GLIBC
	for format in "${formats[@]}"; do
		for package in pilot copilot; do
			(cd "$stage" && GOFLAGS=-buildvcs=false go run $nfpm package --config "$repo/packaging/$package.yaml" --packager "$format" --target "$dir/")
		done
	done
done
rm -rf "$stage"

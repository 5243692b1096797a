#!/usr/bin/env bash
# packages.sh DIR: builds the packages of ARCHS in FORMATS (deb, rpm, tar) into
# DIR, with an SBOM for each program and SHA256SUMS, in place of those that are
# there. VERSION is as scripts/version.sh prints it. The same sources, Go and C
# compiler give the same bytes, wherever they are built.
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
unset GOOS GOARCH
tools=${PILOT_TOOLS:-$repo/.cache/tools}/bin

# v1.2.3-rc.1 is a package's 1.2.3~rc.1, which sorts before 1.2.3; and
# v1.2.3-5-gabcdef its 1.2.3+5.gabcdef, which sorts after 1.2.3 and before
# 1.2.4: with dpkg and rpm alike. With GOFIPS140, it is 1.2.3+fips.
base=${version#v} since=
if [[ $base == *-dirty ]]; then base=${base%-dirty} since=.dirty; fi
if [[ $base =~ ^(.*)-([0-9]+)-(g[0-9a-f]+)$ ]]; then
	base=${BASH_REMATCH[1]} since=.${BASH_REMATCH[2]}.${BASH_REMATCH[3]}$since
fi
[ -z "${GOFIPS140:-}" ] || since+=.fips
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

# install_tool PACKAGE VERSION: go install, unless that version is there.
install_tool() {
	local name=${1##*/}
	[ "$(cat "$tools/.$name" 2>/dev/null)" = "$2" ] && return
	echo "building $name $2"
	mkdir -p "$tools"
	# SBOMs have the hash of the tool that made them.
	(cd / && CGO_ENABLED=0 GOBIN=$tools go install -trimpath -buildvcs=false "$1@$2")
	echo "$2" >"$tools/.$name"
}

ldflags="-s -w -X github.com/ctrlplane/pilot/internal/version.Version=$version"
flags=(-trimpath -buildvcs=false -ldflags "$ldflags")
# build ARCH TO: the programs. pilot and pilot-decoder depend on no library;
# the others reach PKCS#11 modules through cgo.
build() {
	GOARCH=$1 CGO_ENABLED=0 go build "${flags[@]}" -o "$2/" ./cmd/pilot ./cmd/pilot-decoder
	GOARCH=$1 CGO_ENABLED=1 CC=${triplets[$1]}-gcc go build "${flags[@]}" -buildmode=pie -ldflags "$ldflags -extldflags '-Wl,-z,relro,-z,now'" -o "$2/" ./cmd/copilot ./ctr-pilot
}

# glibc FILE...: the version of glibc that programs need.
glibc() {
	objdump -T "$@" | grep -o 'GLIBC_[0-9.]*' | sed 's/GLIBC_//' | sort -Vu | tail -n 1
}

# sbom PROGRAM: what is in it. The proxy is off so that the network does not
# decide what an SBOM says; what is not found then is this module.
sbom() {
	GOPROXY=off "$tools/cyclonedx-gomod" bin -json -noserial -notimestamp -licenses -std -version "$version" "$1" 2>"$stage/sbom.log" ||
		{ cat "$stage/sbom.log" >&2; return 1; }
}

# manuals TO: the manual pages.
manuals() {
	local program page
	for program in ./cmd/pilot ./cmd/pilot-decoder ./ctr-pilot ./cmd/copilot; do
		page=${program##*/}.8
		CGO_ENABLED=0 go run -tags man "${flags[@]}" "$program" | cat - "packaging/man/$page.end" >"$1/$page"
	done
	go run -tags man "${flags[@]}" ./cmd/pilot settings | cat packaging/man/pilot.toml.5.begin - packaging/man/pilot.toml.5.end >"$1/pilot.toml.5"
	cp packaging/man/copilot.toml.5 "$1/"
	gzip -9n "$1"/*
}

# completions TO: the shells' completions. ctr-pilot has the flag of its library; pilot and
# copilot keep the one that is in scripts of earlier releases.
completions() {
	local shell program flag
	for shell in bash zsh fish; do
		mkdir -p "$1/$shell"
		for program in pilot copilot ctr-pilot; do
			flag=--generate-bash-completion
			[ $program != ctr-pilot ] || flag=--generate-shell-completion
			sed "s/@PROGRAM@/$program/g; s/@FLAG@/$flag/g" packaging/completions/$shell >"$1/$shell/$program"
		done
	done
}

# debian_changelog PACKAGE: the changelog of the package itself.
debian_changelog() {
	local epoch
	epoch=$(sed -n 's/^epoch: \(.*\)/\1:/p' "packaging/$1.yaml")
	cat <<-EOF
		$1 ($epoch$PACKAGE_VERSION-1) stable; urgency=medium

		  * pilot $version: see changelog.gz.

		 -- $maintainer  $(date -Rd "@$SOURCE_DATE_EPOCH")
	EOF
}

install_compilers
install_tool github.com/goreleaser/nfpm/v2/cmd/nfpm v2.45.2
install_tool github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod v1.10.0
maintainer=$(sed -n 's/^maintainer: //p' packaging/pilot.yaml)

rm -f "$dir"/*.{deb,rpm,tar.gz,cdx.json} "$dir/SHA256SUMS"
# nfpm's configurations name files of this directory.
stage=$dir/.stage
rm -rf "$stage"
mkdir -p "$stage"/{units,man,doc}
cp -r packaging LICENSE "$stage/"
scripts/copy-docs.sh "$stage" # pages refer to sources, which are not in the packages
cp node/install/units/* packaging/*.service "$stage/units/"
manuals "$stage/man"
completions "$stage/completions"
gzip -9n <CHANGELOG.md >"$stage/doc/changelog.gz"
for package in pilot copilot; do
	debian_changelog $package | gzip -9n >"$stage/doc/$package.changelog.Debian.gz"
done

for arch in "${archs[@]}"; do
	export ARCH=$arch
	bin=$stage/$arch
	build "$arch" "$bin"
	ln -sfn "$arch" "$stage/bin"
	scripts/notices.sh "$bin"/{pilot,pilot-decoder,ctr-pilot} | gzip -9n >"$stage/doc/pilot.notices.gz"
	scripts/notices.sh "$bin/copilot" | gzip -9n >"$stage/doc/copilot.notices.gz"
	GLIBC=$(glibc "$bin/ctr-pilot" "$bin/copilot")
	export GLIBC
	for format in "${formats[@]}"; do
		if [ "$format" = tar ]; then
			name=pilot-${version#v}-linux-$arch
			mkdir "$stage/$name"
			cp -r "$bin"/* "$stage"/{man,completions,docs,README.md} LICENSE CHANGELOG.md "$stage/$name/"
			scripts/notices.sh "$bin"/* >"$stage/$name/third-party-notices"
			tar -C "$stage" --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner -c "$name" | gzip -9n >"$dir/$name.tar.gz"
			continue
		fi
		for package in pilot copilot; do
			(cd "$stage" && "$tools/nfpm" package --config "packaging/$package.yaml" --packager "$format" --target "$dir/" >/dev/null)
		done
	done
	for program in pilot pilot-decoder ctr-pilot copilot; do
		sbom "$bin/$program" >"$dir/$program-${version#v}-linux-$arch.cdx.json"
	done
done
rm -rf "$stage"
cd "$dir"
sha256sum -- *.* >SHA256SUMS.new
mv SHA256SUMS.new SHA256SUMS
ls -l -- *.* SHA256SUMS

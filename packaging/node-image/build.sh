#!/usr/bin/env bash
# build.sh DEB IMAGE: makes a bootable disk image of a node: Debian 13, a
# kernel, containerd, runc, and pilot from a Debian package.
#
#   NODE_IMAGE_PACKAGES   more packages of Debian's, separated by spaces
#   NODE_IMAGE_MIRROR     where to get Debian from, instead of deb.debian.org with
#                         its security updates
#   SOURCE_DATE_EPOCH     the time that files get at most
#
# No loop device is needed, and nothing of this machine comes into the image.
set -euo pipefail
deb=$(realpath "${1:?usage: build.sh DEB IMAGE}")
image=${2:?usage: build.sh DEB IMAGE}
here=$(cd "$(dirname "$0")" && pwd)
: "${SOURCE_DATE_EPOCH:=$(git -C "$here" log -1 --format=%ct 2>/dev/null || date +%s)}"
export SOURCE_DATE_EPOCH E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH DEBIAN_FRONTEND=noninteractive

missing=()
for p in mmdebstrap e2fsprogs dosfstools mtools fdisk systemd; do
	[ "$(dpkg-query -Wf '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
done
if [ ${#missing[@]} -gt 0 ]; then
	echo "installing ${missing[*]}"
	apt-get -qq update
	apt-get -qq install --no-install-recommends "${missing[@]}" >/dev/null
fi

arch=$(dpkg --print-architecture)
case $arch in
amd64) root_type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709 ;;
arm64) root_type=B921B045-1DF0-41C3-AF44-4C6F280D3FAE ;;
*)
	echo "build.sh: no image is made for $arch here: use amd64 or arm64" >&2
	exit 1
	;;
esac
# Constant, as far as they can be.
disk_id=6d1f1b39-94ab-4b70-8b10-7e5b8cf0d5d1
root_id=0f3c3c9d-6c5c-4e3f-8a0b-2a3d5b1e9c47
esp_id=b5a2f2b0-3f2e-4f0e-9d3b-61c8e2a7d4f6

dir=$(mktemp -d)
trap 'rm -rf --one-file-system "$dir"' EXIT
root=$dir/root

packages=$(paste -sd, "$here/packages"),systemd-sysv,systemd-boot,systemd-repart,udev,kmod,e2fsprogs,linux-image-cloud-$arch
[ -z "${NODE_IMAGE_PACKAGES:-}" ] || packages+=,${NODE_IMAGE_PACKAGES// /,}
mkdir -p "$dir/debs"
cp "$deb" "$dir/debs/pilot.deb"
# shellcheck disable=SC2016 # mmdebstrap's shell expands $1
mmdebstrap --quiet --variant=minbase --include="$packages" --aptopt='Acquire::Retries "3"' \
	--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
	--dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
	--customize-hook="copy-in $dir/debs/pilot.deb /" \
	--customize-hook='chroot "$1" apt-get -qq install --no-install-recommends /pilot.deb >/dev/null && rm "$1/pilot.deb"' \
	--customize-hook="$here/provision.sh \"\$1\"" \
	--customize-hook="$here/bootloader.sh \"\$1\" 'root=PARTUUID=$root_id rw console=tty0 console=ttyS0'" \
	trixie "$root" ${NODE_IMAGE_MIRROR:+"$NODE_IMAGE_MIRROR"}

# The ESP is a partition of its own.
mv "$root/efi" "$dir/esp"
mkdir -m 0700 "$root/efi"
# These have the time of the build.
rm -rf "$root"/var/log/{apt,*.log} "$root"/var/cache/ldconfig
find "$root" "$dir/esp" -newermt "@$SOURCE_DATE_EPOCH" -exec touch -hd "@$SOURCE_DATE_EPOCH" {} +

# size DIR FREE: MiB that a file system needs for what is in a directory.
size() { echo $(($(du -xsm --apparent-size "$1" | cut -f1) * 115 / 100 + $2)); }
esp_mb=$(size "$dir/esp" 64) # a second kernel, while one replaces the other
root_mb=$(size "$root" 64)
truncate -s "${esp_mb}M" "$dir/esp.fs"
mkfs.vfat --invariant -i 50494c4f -n ESP -F 32 "$dir/esp.fs" >/dev/null
(cd "$dir/esp" && mcopy -spmQ -i "$dir/esp.fs" ./* ::)
mkfs.ext4 -q -U "$root_id" -E "hash_seed=$root_id,lazy_itable_init=0,lazy_journal_init=0" -L root -d "$root" "$dir/root.fs" "${root_mb}M"

mkdir -p "$(dirname "$image")"
rm -f "$image.part"
truncate -s $((esp_mb + root_mb + 2))M "$image.part"
sfdisk -q "$image.part" <<EOF
label: gpt
label-id: $disk_id
start=1MiB, size=${esp_mb}MiB, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, uuid=$esp_id, name=esp
size=${root_mb}MiB, type=$root_type, uuid=$root_id, name=root
EOF
dd if="$dir/esp.fs" of="$image.part" bs=1M seek=1 conv=notrunc,sparse status=none
dd if="$dir/root.fs" of="$image.part" bs=1M seek=$((1 + esp_mb)) conv=notrunc,sparse status=none
mv "$image.part" "$image"
echo "$image: $(du -m "$image" | cut -f1) MiB"

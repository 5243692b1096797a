#!/usr/bin/env bash
# provision.sh ROOT: makes a node of a Debian 13 root that has containerd, runc
# and pilot. The same for an image made here, by Packer and by mkosi.
set -euo pipefail
root=${1:?usage: provision.sh ROOT}
# Whatever modes a checkout has, and none for directories that are there.
tar -C "$(dirname "$0")/files" --owner=0 --group=0 --mode=u=rwX,go=rX -c . | tar -C "$root" --no-overwrite-dir -x
ln -sfn ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"

"$root/usr/bin/pilot" node install --root "$root"
systemctl --root "$root" --quiet enable pilot-firstboot.service systemd-networkd.service systemd-resolved.service systemd-timesyncd.service
# It has a partition to itself, but only in a disk image.
mkdir -p "$root/etc/systemd/system/local-fs.target.wants"
ln -sfn /usr/lib/systemd/system/systemd-growfs-root.service "$root/etc/systemd/system/local-fs.target.wants/"
# Nothing has changed since the image was made: the first boot need not look.
touch "$root/etc/.updated" "$root/var/.updated"

# What each machine has to have of its own.
: >"$root/etc/machine-id"
rm -f "$root"/etc/ssh/ssh_host_*_key* "$root"/etc/hostname "$root"/var/lib/systemd/random-seed "$root"/var/lib/dbus/machine-id

#!/usr/bin/env bash
# bootloader.sh ROOT CMDLINE: puts systemd-boot and the root's kernel into its
# /efi, where apt puts those that it upgrades to, too.
set -euo pipefail
root=$1
mkdir -p "$root/efi" "$root/etc/kernel"
echo "$2" >"$root/etc/kernel/cmdline"
echo pilot-node >"$root/etc/kernel/entry-token"
printf 'layout=bls\nBOOT_ROOT=/efi\n' >"$root/etc/kernel/install.conf"

# bootctl wants a mount, but no partition.
mount --bind "$root/efi" "$root/efi"
trap 'umount "$root/efi"' EXIT
export SYSTEMD_RELAX_ESP_CHECKS=1 BOOT_MNT=/efi
chroot "$root" bootctl --quiet --esp-path=/efi --no-variables --random-seed=no install
kernel=$(ls "$root/usr/lib/modules")
chroot "$root" kernel-install add "$kernel" "/boot/vmlinuz-$kernel" "/boot/initrd.img-$kernel"
printf 'timeout 0\neditor no\n' >"$root/efi/loader/loader.conf"

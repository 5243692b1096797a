#!/usr/bin/env bash
# SoftHSM 2.6.1: while one process logs in, another one can't open the token.
#
# Four processes at once open a session, log in with the right PIN and list the objects.
# One after the other all of them work. Together, about one in six finds no token of that
# name: each login writes the token's file again, and a process that reads it meanwhile takes
# the token for damaged. Whatever has a process for each operation meets that, such as
# ctd-decoder with ocicrypt's pkcs11 keys: ocicrypt then says "Could not create session to any
# slot and/or log in", as it does for a wrong PIN. Compare SoftHSMv2's issue 757.
#
# Exits non-zero if that changes. Needs Debian 12 with its sources for apt. Installs nothing.
set -euo pipefail
softhsm=2.6.1-2.1

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
mkdir packages root tokens
(
	cd packages
	apt-get download softhsm2=$softhsm libsofthsm2=$softhsm opensc opensc-pkcs11
) >apt.log 2>&1 || { cat apt.log; exit 2; }
for package in packages/*.deb; do dpkg-deb -x "$package" root; done
module=$dir/root/usr/lib/softhsm/libsofthsm2.so
export SOFTHSM2_CONF=$dir/conf LD_LIBRARY_PATH=$dir/root/usr/lib/x86_64-linux-gnu PATH=$dir/root/usr/bin:$PATH
printf 'directories.tokendir = %s/tokens\nobjectstore.backend = file\n' "$dir" >conf
softhsm2-util --module "$module" --init-token --free --label test --pin 1234 --so-pin 1234
tool() { pkcs11-tool --module "$module" --token-label test --login --pin 1234 "$@"; }
tool --keypairgen --key-type rsa:2048 --id a1 --label key >keygen.log 2>&1 || { cat keygen.log; exit 2; }

alone=0
for _ in $(seq 40); do
	tool --list-objects >log 2>&1 || alone=$((alone + 1))
done
for i in $(seq 60); do
	for j in 1 2 3 4; do
		tool --list-objects >"log.$i.$j" 2>&1 || echo "$i.$j" >>failed &
	done
	wait
done
touch failed
together=$(wc -l <failed)
echo "SoftHSM $softhsm: $alone of 40 fail one after the other, $together of 240 four at a time:"
for f in $(cat failed); do tail -1 "log.$f"; done | sort | uniq -c
[ "$alone" = 0 ] && [ "$together" -gt 0 ]

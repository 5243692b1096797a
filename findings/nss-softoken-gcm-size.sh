#!/usr/bin/env bash
# NSS's softoken 3.87.1 reports a size that is too small for AES-GCM. Called without a
# buffer, C_Encrypt of 32 bytes reports 32: the tag of 16 bytes is left out. With a buffer
# of that size it fails with CKR_BUFFER_TOO_SMALL and reports 32 again, and the operation
# has ended. With 48 bytes it works.
#
# PKCS#11 2.40 lets the reported size be larger than needed, not smaller (section 5.2), and
# C_Encrypt does not end an operation by CKR_BUFFER_TOO_SMALL (5.8.2). Programs that call
# for the size and allocate it, as Go's github.com/miekg/pkcs11 does, can't encrypt.
#
# Exits non-zero if that changes. Needs Debian 12 on amd64 with its sources for apt, a C
# compiler, and Go for the headers of PKCS#11. Installs nothing.
set -euo pipefail
nss=2:3.87.1-1+deb12u4

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
mkdir packages root
(
	cd packages
	apt-get download libnss3=$nss libnspr4 libsqlite3-0
) >apt.log 2>&1 || { cat apt.log; exit 2; }
for package in packages/*.deb; do dpkg-deb -x "$package" root; done
headers=$(cd / && GOFLAGS=-mod=mod go mod download -json github.com/miekg/pkcs11@v1.1.2 | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')

cat >main.c <<'C'
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include "pkcs11go.h"

static void check(const char *what, CK_RV rv) {
	if (rv != CKR_OK) {
		printf("%s: 0x%lx\n", what, rv);
		exit(2);
	}
}

int main(int argc, char **argv) {
	void *module = dlopen(argv[1], RTLD_NOW);
	if (module == NULL) {
		puts(dlerror());
		return 2;
	}
	CK_C_GetFunctionList get = (CK_C_GetFunctionList)dlsym(module, "C_GetFunctionList");
	CK_FUNCTION_LIST_PTR f;
	check("C_GetFunctionList", get(&f));
	/* Without a database: the key is the session's. */
	CK_C_INITIALIZE_ARGS args = {.flags = CKF_OS_LOCKING_OK, .pReserved = "configdir='' flags=readOnly,noCertDB,noModDB"};
	check("C_Initialize", f->C_Initialize(&args));
	CK_SLOT_ID slots[8];
	CK_ULONG n = 8;
	check("C_GetSlotList", f->C_GetSlotList(CK_TRUE, slots, &n));
	CK_SESSION_HANDLE session;
	check("C_OpenSession", f->C_OpenSession(slots[0], CKF_SERIAL_SESSION, NULL, NULL, &session));
	CK_ULONG length = 32;
	CK_BBOOL yes = CK_TRUE;
	CK_ATTRIBUTE attributes[] = {{CKA_VALUE_LEN, &length, sizeof length}, {CKA_ENCRYPT, &yes, sizeof yes}};
	CK_MECHANISM generate = {CKM_AES_KEY_GEN, NULL, 0};
	CK_OBJECT_HANDLE key;
	check("C_GenerateKey", f->C_GenerateKey(session, &generate, attributes, 2, &key));
	CK_BYTE iv[12] = {0}, plain[32] = {0}, out[64];
	CK_GCM_PARAMS gcm = {.pIv = iv, .ulIvLen = sizeof iv, .ulIvBits = 8 * sizeof iv, .ulTagBits = 128};
	CK_MECHANISM mechanism = {CKM_AES_GCM, &gcm, sizeof gcm};
	check("C_EncryptInit", f->C_EncryptInit(session, &mechanism, key));
	CK_ULONG size = 0;
	check("C_Encrypt without a buffer", f->C_Encrypt(session, plain, sizeof plain, NULL, &size));
	printf("C_Encrypt of 32 bytes without a buffer: reports %lu\n", size);
	CK_RV rv = f->C_Encrypt(session, plain, sizeof plain, out, &size);
	printf("with a buffer of that size: 0x%lx, reports %lu\n", rv, size);
	size = sizeof out;
	rv = f->C_Encrypt(session, plain, sizeof plain, out, &size);
	printf("once more with 64 bytes: 0x%lx\n", rv);
	check("C_EncryptInit", f->C_EncryptInit(session, &mechanism, key));
	size = 48;
	rv = f->C_Encrypt(session, plain, sizeof plain, out, &size);
	printf("anew with 48 bytes: 0x%lx, reports %lu\n", rv, size);
}
C
cc -I"$headers" -o main main.c -ldl
echo "libsoftokn3.so of libnss3 $nss"
LD_LIBRARY_PATH=$(echo root/usr/lib/*-linux-gnu) ./main root/usr/lib/*-linux-gnu/libsoftokn3.so | tee out
# 0x150 is CKR_BUFFER_TOO_SMALL, 0x91 is CKR_OPERATION_NOT_INITIALIZED.
diff - out <<'END'
C_Encrypt of 32 bytes without a buffer: reports 32
with a buffer of that size: 0x150, reports 32
once more with 64 bytes: 0x91
anew with 48 bytes: 0x0, reports 48
END

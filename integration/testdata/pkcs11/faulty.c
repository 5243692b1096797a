// faulty.c is SoftHSM with faults. They are files beside the library, named
// for them; each says below what it does. Initializations and logins are counted in
// the files "initialized" and "logins".
#include <dlfcn.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>
#include "pkcs11go.h"

static struct CK_FUNCTION_LIST faulty;
static CK_FUNCTION_LIST_PTR real;
static char dir[4096];

static const char *file(const char *name)
{
	static __thread char path[4200];
	snprintf(path, sizeof path, "%s/%s", dir, name);
	return path;
}

static int fault(const char *name) { return access(file(name), F_OK) == 0; }

static void count(const char *name)
{
	FILE *f = fopen(file(name), "a");
	fputc('.', f);
	fclose(f);
}

// alone: it takes a while to start, and no second process beside the first.
static CK_RV Initialize(CK_VOID_PTR args)
{
	count("initialized");
	if (fault("alone")) {
		if (flock(open(file("alone"), O_RDONLY | O_CLOEXEC), LOCK_EX | LOCK_NB))
			return CKR_GENERAL_ERROR;
		usleep(300000);
	}
	return real->C_Initialize(args);
}

// removed: the token is not there.
static CK_RV GetSlotList(CK_BBOOL present, CK_SLOT_ID_PTR list, CK_ULONG_PTR count)
{
	if (fault("removed")) {
		*count = 0;
		return CKR_OK;
	}
	return real->C_GetSlotList(present, list, count);
}

// final-try: one more wrong PIN locks the token.
static CK_RV GetTokenInfo(CK_SLOT_ID slot, CK_TOKEN_INFO_PTR info)
{
	if (fault("removed"))
		return CKR_TOKEN_NOT_PRESENT;
	CK_RV rv = real->C_GetTokenInfo(slot, info);
	if (rv == CKR_OK && fault("final-try"))
		info->flags |= CKF_USER_PIN_FINAL_TRY;
	return rv;
}

static CK_RV OpenSession(CK_SLOT_ID slot, CK_FLAGS flags, CK_VOID_PTR app, CK_NOTIFY notify, CK_SESSION_HANDLE_PTR session)
{
	return fault("removed") ? CKR_TOKEN_NOT_PRESENT : real->C_OpenSession(slot, flags, app, notify, session);
}

static CK_RV Login(CK_SESSION_HANDLE session, CK_USER_TYPE user, CK_UTF8CHAR_PTR pin, CK_ULONG len)
{
	count("logins");
	return real->C_Login(session, user, pin, len);
}

// forgotten: the HSM closed all sessions, once.
static CK_RV FindObjectsInit(CK_SESSION_HANDLE session, CK_ATTRIBUTE_PTR template, CK_ULONG count)
{
	if (fault("removed"))
		return CKR_DEVICE_REMOVED;
	if (unlink(file("forgotten")) == 0) {
		CK_SESSION_INFO info;
		real->C_GetSessionInfo(session, &info);
		real->C_CloseAllSessions(info.slotID);
	}
	return real->C_FindObjectsInit(session, template, count);
}

static void may_crash(void)
{
	if (unlink(file("crash")) == 0 || fault("crashes"))
		*(volatile int *)8 = 1;
}

static CK_RV DecryptInit(CK_SESSION_HANDLE session, CK_MECHANISM_PTR mechanism, CK_OBJECT_HANDLE key)
{
	may_crash();
	return real->C_DecryptInit(session, mechanism, key);
}

// slow: it hangs. crash: it crashes, once. crashes: each time. own-nonce: it takes zeros for a nonce, and makes its own.
static CK_RV EncryptInit(CK_SESSION_HANDLE session, CK_MECHANISM_PTR mechanism, CK_OBJECT_HANDLE key)
{
	may_crash();
	while (fault("slow"))
		usleep(10000);
	if (fault("own-nonce")) {
		CK_GCM_PARAMS *p = mechanism->pParameter;
		for (CK_ULONG i = 0; i < p->ulIvLen; i++)
			if (p->pIv[i] != 0)
				return CKR_MECHANISM_PARAM_INVALID;
		real->C_GenerateRandom(session, p->pIv, p->ulIvLen);
	}
	return real->C_EncryptInit(session, mechanism, key);
}

// no-change: attributes are what they were made as.
static CK_RV SetAttributeValue(CK_SESSION_HANDLE session, CK_OBJECT_HANDLE key, CK_ATTRIBUTE_PTR template, CK_ULONG count)
{
	return fault("no-change") ? CKR_ATTRIBUTE_READ_ONLY : real->C_SetAttributeValue(session, key, template, count);
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR list)
{
	Dl_info self;
	CK_C_GetFunctionList get;
	void *lib = dlopen(SOFTHSM, RTLD_NOW | RTLD_LOCAL);
	if (!lib || !dladdr((void *)C_GetFunctionList, &self) || !(get = dlsym(lib, "C_GetFunctionList")) || get(&real) != CKR_OK)
		return CKR_GENERAL_ERROR;
	snprintf(dir, sizeof dir, "%s", self.dli_fname);
	dirname(dir);
	faulty = *real;
	faulty.C_Initialize = Initialize;
	faulty.C_GetSlotList = GetSlotList;
	faulty.C_GetTokenInfo = GetTokenInfo;
	faulty.C_OpenSession = OpenSession;
	faulty.C_Login = Login;
	faulty.C_FindObjectsInit = FindObjectsInit;
	faulty.C_EncryptInit = EncryptInit;
	faulty.C_DecryptInit = DecryptInit;
	faulty.C_SetAttributeValue = SetAttributeValue;
	*list = &faulty;
	return CKR_OK;
}

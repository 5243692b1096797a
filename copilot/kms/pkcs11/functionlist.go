//go:build linux && cgo && !no_pkcs11

package pkcs11

/*
#cgo linux LDFLAGS: -ldl
#include <dlfcn.h>
#include <signal.h>
#include <stdlib.h>

// A PKCS#11 function list, as all platforms but Windows lay it out: the version,
// then the functions in the order of the standard.
struct function_list {
	struct { unsigned char major, minor; } version;
	void *function[];
};
enum { C_Encrypt = 30 };

static unsigned long function_list(const char *path, struct function_list **list) {
	void *lib = dlopen(path, RTLD_LAZY);
	if (lib == NULL)
		return 0x5; // CKR_GENERAL_ERROR
	unsigned long (*get)(struct function_list **) = dlsym(lib, "C_GetFunctionList");
	return get == NULL ? 0x5 : get(list);
}

static unsigned long encrypt(struct function_list *list, unsigned long session, void *in, unsigned long in_size, void *out, unsigned long *out_size) {
	unsigned long (*f)(unsigned long, void *, unsigned long, void *, unsigned long *) = list->function[C_Encrypt];
	return f(session, in, in_size, out, out_size);
}

static void default_signals(void) {
	int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP, SIGSYS};
	for (size_t i = 0; i < sizeof signals / sizeof *signals; i++)
		signal(signals[i], SIG_DFL);
}
*/
import "C"

import (
	"unsafe"

	"github.com/miekg/pkcs11"
)

// functionList is a module's, for what the pkcs11 package does another way.
type functionList struct{ list *C.struct_function_list }

// newFunctionList returns that of a module that is loaded.
func newFunctionList(path string) (l functionList, err error) {
	name := C.CString(path)
	defer C.free(unsafe.Pointer(name))
	if rv := C.function_list(name, &l.list); rv != pkcs11.CKR_OK {
		return l, pkcs11.Error(rv)
	}
	return l, nil
}

// encrypt ends an encryption. The pkcs11 package asks C_Encrypt for the size and
// gives it a buffer of that; NSS's softoken says 32 bytes and wants 48. This
// gives it one that is large enough for a nonce and a tag, too, and does not ask.
func (l functionList) encrypt(session pkcs11.SessionHandle, plaintext []byte) ([]byte, error) {
	out := make([]byte, len(plaintext)+64)
	size := C.ulong(len(out))
	rv := C.encrypt(l.list, C.ulong(session), unsafe.Pointer(unsafe.SliceData(plaintext)), C.ulong(len(plaintext)), unsafe.Pointer(unsafe.SliceData(out)), &size)
	if rv != pkcs11.CKR_OK {
		return nil, pkcs11.Error(rv)
	}
	return out[:min(int(size), len(out))], nil
}

// reserved returns parameters as C_Initialize takes them in pReserved. A module may
// keep them, so they are never freed.
func reserved(parameters string) unsafe.Pointer { return unsafe.Pointer(C.CString(parameters)) }

// defaultSignals has a crash end this process by its signal. Go's runtime would print
// traces, which say nothing about a module, and the registers, and exit with 2.
func defaultSignals() { C.default_signals() }

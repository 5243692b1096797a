package harness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/kms/kmstest"
	pkcs11kms "github.com/ctrlplane/pilot/copilot/kms/pkcs11"
	"github.com/miekg/pkcs11"
)

const SoftHSMModule = "/usr/lib/softhsm/libsofthsm2.so"

// HSMToken is a token of SoftHSM's.
type HSMToken struct {
	t      testing.TB
	Dir    string
	module string
	Pin    string // the file
}

// NewHSMToken makes a token with AES keys of version 1 at the paths given. SoftHSM's
// configuration is named by the environment, so there is one at a time.
func NewHSMToken(t testing.TB, keys ...string) *HSMToken {
	t.Helper()
	dir := TempDir(t)
	if err := os.Mkdir(dir+"/tokens", 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", Write(t, dir+"/softhsm2.conf", "directories.tokendir = "+dir+"/tokens\nlog.level = ERROR\n"))
	k := &HSMToken{t, dir, SoftHSMModule, Write(t, dir+"/pin", "123456\n")}
	Output(t, Command(t, "softhsm2-util", "--init-token", "--free", "--label", "copilot", "--so-pin", "12345678", "--pin", "123456"))
	for _, key := range keys {
		k.Add(key, "01", 32)
	}
	return k
}

func (k *HSMToken) Add(key, id string, size int) {
	k.t.Helper()
	file := Write(k.t, k.Dir+"/key", strings.Repeat(key+id, size)[:size])
	Output(k.t, Command(k.t, "softhsm2-util", "--import", file, "--aes", "--token", "copilot", "--label", key, "--id", id, "--pin", "123456"))
}

// Faulty has the token's module be one in which a fault can be had by making
// the file of that name in the directory returned.
func (k *HSMToken) Faulty() (dir string) {
	k.t.Helper()
	dir = k.Dir + "/module"
	k.module = FaultyModule(k.t, dir)
	return dir
}

// FaultyModule builds it into a new directory.
func FaultyModule(t testing.TB, dir string) (module string) {
	t.Helper()
	module = dir + "/faulty.so"
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	headers := Command(t, "go", "list", "-buildvcs=false", "-m", "-f", "{{.Dir}}", "github.com/miekg/pkcs11")
	headers.Dir = Repo
	Output(t, Command(t, "cc", "-shared", "-fPIC", "-Wall", "-D_GNU_SOURCE", `-DSOFTHSM="`+SoftHSMModule+`"`, "-I", strings.TrimSpace(Output(t, headers)),
		"-o", module, filepath.Join(Repo, "integration/testdata/pkcs11/faulty.c"), "-ldl"))
	return module
}

func (k *HSMToken) Settings() string {
	return fmt.Sprintf("module = '%s'\ntoken = 'copilot'\npin-file = '%s'\n", k.module, k.Pin)
}

type HSM interface {
	kms.Wrapper
	kms.Rotator
	Close() error
}

func (k *HSMToken) Open() HSM {
	k.t.Helper()
	b, err := pkcs11kms.Types().Open("pkcs11", kmstest.Settings(k.Settings()))
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() {
		if err := b.Close(); err != nil {
			k.t.Error(err)
		}
	})
	return b.(HSM)
}

// Session is one that is logged in, for what no backend does.
func (k *HSMToken) Session() (*pkcs11.Ctx, pkcs11.SessionHandle) {
	k.t.Helper()
	p := pkcs11.New(k.module)
	if err := p.Initialize(); err != nil && !errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)) {
		k.t.Fatal(err)
	}
	slots, err := p.GetSlotList(true)
	if err != nil {
		k.t.Fatal(err)
	}
	s, err := p.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err == nil {
		if err = p.Login(s, pkcs11.CKU_USER, "123456"); errors.Is(err, pkcs11.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN)) {
			err = nil
		}
	}
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { p.Finalize() })
	return p, s
}

// Find returns the keys at a path, or all if it is empty.
func (k *HSMToken) Find(path string) (*pkcs11.Ctx, pkcs11.SessionHandle, []pkcs11.ObjectHandle) {
	k.t.Helper()
	p, s := k.Session()
	template := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY)}
	if path != "" {
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_LABEL, path))
	}
	if err := p.FindObjectsInit(s, template); err != nil {
		k.t.Fatal(err)
	}
	defer p.FindObjectsFinal(s)
	handles, _, err := p.FindObjects(s, 1000)
	if err != nil {
		k.t.Fatal(err)
	}
	return p, s, handles
}

package integration

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/kms/kmstest"
)

const softHSM = "/usr/lib/softhsm/libsofthsm2.so"

// token is a token of SoftHSM's.
type token struct {
	t      testing.TB
	dir    string
	module string
	pin    string // the file
}

// newToken makes a token with AES keys of version 1 at the paths given. SoftHSM's
// configuration is named by the environment, so there is one at a time.
func newToken(t testing.TB, keys ...string) *token {
	t.Helper()
	dir := tempDir(t)
	if err := os.Mkdir(dir+"/tokens", 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", write(t, dir+"/softhsm2.conf", "directories.tokendir = "+dir+"/tokens\nlog.level = ERROR\n"))
	k := &token{t, dir, softHSM, write(t, dir+"/pin", "123456\n")}
	output(t, command(t, "softhsm2-util", "--init-token", "--free", "--label", "copilot", "--so-pin", "12345678", "--pin", "123456"))
	for _, key := range keys {
		k.add(key, "01", 32)
	}
	return k
}

func (k *token) add(key, id string, size int) {
	k.t.Helper()
	file := write(k.t, k.dir+"/key", strings.Repeat(key+id, size)[:size])
	output(k.t, command(k.t, "softhsm2-util", "--import", file, "--aes", "--token", "copilot", "--label", key, "--id", id, "--pin", "123456"))
}

// faulty has the token's module be one in which a fault can be had by making
// the file of that name in the directory returned.
func (k *token) faulty() (dir string) {
	k.t.Helper()
	dir = k.dir + "/module"
	k.module = faultyModule(k.t, dir)
	return dir
}

// faultyModule builds it into a new directory.
func faultyModule(t testing.TB, dir string) (module string) {
	t.Helper()
	module = dir + "/faulty.so"
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	headers := command(t, "go", "list", "-buildvcs=false", "-m", "-f", "{{.Dir}}", "github.com/miekg/pkcs11")
	headers.Dir = repo
	output(t, command(t, "cc", "-shared", "-fPIC", "-Wall", "-D_GNU_SOURCE", `-DSOFTHSM="`+softHSM+`"`, "-I", strings.TrimSpace(output(t, headers)),
		"-o", module, filepath.Join(repo, "integration/testdata/pkcs11/faulty.c"), "-ldl"))
	return module
}

func (k *token) settings() string {
	return fmt.Sprintf("module = '%s'\ntoken = 'copilot'\npin-file = '%s'\n", k.module, k.pin)
}

type hsm interface {
	kms.Wrapper
	kms.Rotator
	Close() error
}

func (k *token) open() hsm {
	k.t.Helper()
	b, err := kms.Open("pkcs11", kmstest.Settings(k.settings()))
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() {
		if err := b.Close(); err != nil {
			k.t.Error(err)
		}
	})
	return b.(hsm)
}

// session is one that is logged in, for what no backend does.
func (k *token) session() (*pkcs11.Ctx, pkcs11.SessionHandle) {
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

// find returns the keys at a path, or all if it is empty.
func (k *token) find(path string) (*pkcs11.Ctx, pkcs11.SessionHandle, []pkcs11.ObjectHandle) {
	k.t.Helper()
	p, s := k.session()
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

func wrap(t testing.TB, w kms.Wrapper, path string, want int) []byte {
	t.Helper()
	version, wrapped, err := w.Wrap(t.Context(), path, kmstest.Secret)
	if err != nil || version != want {
		t.Fatalf("wrap with %s: version %d, %v, want version %d", path, version, err, want)
	}
	return wrapped
}

func unwrap(t testing.TB, w kms.Wrapper, path string, version int, wrapped []byte) {
	t.Helper()
	if got, err := w.Unwrap(t.Context(), path, version, wrapped); err != nil || !bytes.Equal(got, kmstest.Secret) {
		t.Errorf("unwrap with %s, version %d: %q, %v", path, version, got, err)
	}
}

// wrapsAgain waits until a key wraps: after a failure, a backend waits before it
// tries again.
func wrapsAgain(t testing.TB, w kms.Wrapper, path string) {
	t.Helper()
	await(t, "wrap with "+path, func() error {
		_, _, err := w.Wrap(t.Context(), path, kmstest.Secret)
		return err
	})
}

func TestHSM(t *testing.T) {
	k := newToken(t, "a", "b")
	h := k.open()
	kmstest.CheckWrapper(t, h, "a", "b")
	first := wrap(t, h, "a", 1)
	if version, err := h.Rotate(t.Context(), "a"); err != nil || version != 2 {
		t.Fatalf("rotate: %d, %v", version, err)
	}
	second := wrap(t, h, "a", 2)
	unwrap(t, h, "a", 1, first)
	unwrap(t, h, "a", 2, second)
	for version, wrapped := range map[int][]byte{1: second, 2: first} {
		if got, err := h.Unwrap(t.Context(), "a", version, wrapped); !errors.Is(err, kms.ErrUnwrap) {
			t.Errorf("unwrap with the other version: %q, %v", got, err)
		}
	}
	if got, err := h.Unwrap(t.Context(), "a", 3, second); !errors.Is(err, kms.ErrNotFound) {
		t.Errorf("unwrap with a version that is not there: %q, %v", got, err)
	}
	wrap(t, h, "b", 1)

	p, s, handles := k.find("a")
	made := 0
	for _, handle := range handles {
		values, err := p.GetAttributeValue(s, handle, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_ID, nil), pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, nil), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, nil),
			pkcs11.NewAttribute(pkcs11.CKA_NEVER_EXTRACTABLE, nil), pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, nil),
		})
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(values[0].Value, []byte{2}) {
			made++
			if values[1].Value[0] != 1 || values[2].Value[0] != 0 || values[3].Value[0] != 1 || values[4].Value[0] != 32 {
				t.Errorf("attributes of version 2: %v", values)
			}
		}
	}
	if made != 1 || len(handles) != 2 {
		t.Errorf("%d keys, %d of version 2", len(handles), made)
	}

	// Versions are numbers, in however many bytes.
	k.add("wide", "01", 32)
	k.add("wide", "0100", 32)
	k.add("wide", "00ff", 32)
	wrap(t, h, "wide", 256)
	if version, err := h.Rotate(t.Context(), "wide"); err != nil || version != 257 {
		t.Errorf("rotate: %d, %v", version, err)
	}
	kmstest.Refuses(t, "missing", h, "missing", first, kms.ErrNotFound)
	if version, err := h.Rotate(t.Context(), "missing"); !errors.Is(err, kms.ErrNotFound) {
		t.Errorf("rotate what is not there: %d, %v", version, err)
	}
	k.add("small", "01", 16)
	kmstest.Refuses(t, "AES-128", h, "small", first, kms.ErrNotFound)
	k.add("zero", "00", 32)
	kmstest.Refuses(t, "version 0", h, "zero", first, kms.ErrNotFound)
	k.add("twice", "01", 32)
	k.add("twice", "0001", 32)
	if _, _, err := h.Wrap(t.Context(), "twice", kmstest.Secret); !errors.Is(err, kms.ErrUnavailable) || !strings.Contains(err.Error(), "two keys of version 1") {
		t.Errorf("wrap with one of two: %v", err)
	}

	// Keys that may not encrypt any more unwrap.
	for _, handle := range handles {
		if err := p.SetAttributeValue(s, handle, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, false)}); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := h.Wrap(t.Context(), "a", kmstest.Secret); !errors.Is(err, kms.ErrForbidden) {
		t.Errorf("wrap with a disabled key: %v", err)
	}
	unwrap(t, h, "a", 1, first)
	for _, handle := range handles {
		if err := p.SetAttributeValue(s, handle, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, false)}); err != nil {
			t.Fatal(err)
		}
	}
	kmstest.Refuses(t, "disabled", h, "a", first, kms.ErrForbidden)
}

func TestHSMSettings(t *testing.T) {
	k := newToken(t)
	for want, settings := range map[string]string{
		"absolute path":     "module = 'libsofthsm2.so'\ntoken = 'copilot'\npin-file = '" + k.pin + "'",
		"module:":           "module = '/nonexistent.so'\ntoken = 'copilot'\npin-file = '" + k.pin + "'",
		"the token's label": "module = '" + softHSM + "'\npin-file = '" + k.pin + "'",
		"a file with":       "module = '" + softHSM + "'\ntoken = 'copilot'",
		"no such file":      "module = '" + softHSM + "'\ntoken = 'copilot'\npin-file = '/nonexistent'",
		"not one line":      "module = '" + softHSM + "'\ntoken = 'copilot'\npin-file = '" + write(t, k.dir+"/empty", "\n") + "'",
		"strict mode":       k.settings() + "slot = 1",
	} {
		if _, err := kms.Open("pkcs11", kmstest.Settings(settings)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	if err := os.Chmod(k.pin, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := kms.Open("pkcs11", kmstest.Settings(k.settings())); err == nil || !strings.Contains(err.Error(), "chmod 0600") {
		t.Errorf("a PIN for everybody: %v", err)
	}
	if err := os.Chmod(k.pin, 0o600); err != nil {
		t.Fatal(err)
	}

	// These open, as the HSM may be away.
	for want, settings := range map[string]string{
		`only "copilot"`:  strings.Replace(k.settings(), "'copilot'", "'another'", 1),
		"serial number":   strings.Replace(k.settings(), "token =", "serial =", 1),
		"can't be loaded": strings.Replace(k.settings(), softHSM, bin+"/copilot", 1),
	} {
		b, err := kms.Open("pkcs11", kmstest.Settings(settings))
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := b.(kms.Wrapper).Wrap(t.Context(), "a", kmstest.Secret); !errors.Is(err, kms.ErrUnavailable) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
		b.Close()
	}
}

// TestHSMAtOnce has many calls at once in one process.
func TestHSMAtOnce(t *testing.T) {
	k := newToken(t, "a")
	h := k.open()
	var g sync.WaitGroup
	for range 20 {
		g.Go(func() {
			for range 20 {
				version, wrapped, err := h.Wrap(t.Context(), "a", kmstest.Secret)
				if err != nil {
					t.Error(err)
					return
				}
				unwrap(t, h, "a", version, wrapped)
			}
		})
	}
	var made sync.Map
	for range 3 {
		g.Go(func() {
			version, err := h.Rotate(t.Context(), "a")
			// SoftHSM now and then reads a file that it is writing.
			for try := 0; errors.Is(err, kms.ErrUnavailable) && try < 200; try++ {
				time.Sleep(10 * time.Millisecond)
				version, err = h.Rotate(t.Context(), "a")
			}
			if err != nil {
				t.Error(err)
			}
			if _, twice := made.LoadOrStore(version, true); twice {
				t.Errorf("version %d was made twice", version)
			}
		})
	}
	g.Wait()
	highest := 0
	made.Range(func(version, _ any) bool {
		highest = max(highest, version.(int))
		return true
	})
	wrap(t, h, "a", highest)
}

// TestHSMRotateAtOnce has several brokers rotate a key and wrap with it at once.
func TestHSMRotateAtOnce(t *testing.T) {
	k := newToken(t, "a")
	build := command(t, "go", "build", "-buildvcs=false", "-o", k.dir+"/hsmrotate", "./integration/testdata/hsmrotate")
	build.Dir = repo
	output(t, build)
	const brokers, times = 4, 5
	outputs := make([]string, brokers)
	var g sync.WaitGroup
	for i := range outputs {
		cmd := command(t, k.dir+"/hsmrotate", k.settings(), "a", fmt.Sprint(times))
		g.Go(func() {
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			out, err := cmd.Output()
			if outputs[i] = string(out); err != nil {
				t.Errorf("broker %d: %v", i, err)
			}
			t.Logf("broker %d:\n%s", i, &stderr)
		})
	}
	g.Wait()
	h := k.open()
	made := map[string]int{}
	wrapped := 0
	for line := range strings.Lines(strings.Join(outputs, "")) {
		words := strings.Fields(line)
		switch words[0] {
		case "made":
			made[words[1]]++
		case "wrapped":
			var version int
			fmt.Sscan(words[1], &version)
			b, err := hex.DecodeString(words[2])
			if err != nil {
				t.Fatal(err)
			}
			unwrap(t, h, "a", version, b)
			wrapped++
		}
	}
	for version, times := range made {
		if times != 1 {
			t.Errorf("version %s was made %d times", version, times)
		}
	}
	if _, _, handles := k.find("a"); len(made) != brokers*times || len(handles) != 1+len(made) || wrapped != 5*brokers*times {
		t.Errorf("%d versions made, %d keys, %d wrapped", len(made), len(handles), wrapped)
	}
}

func TestHSMWrongPIN(t *testing.T) {
	k := newToken(t, "a")
	dir := k.faulty()
	logins := func() int {
		b, _ := os.ReadFile(dir + "/logins")
		return len(b)
	}
	write(t, k.pin, "654321\n")
	h := k.open()
	var g sync.WaitGroup
	for range 10 {
		g.Go(func() {
			if _, _, err := h.Wrap(t.Context(), "a", kmstest.Secret); !errors.Is(err, kms.ErrForbidden) ||
				strings.Count(err.Error(), "CKR_PIN_INCORRECT") != 1 || strings.Count(err.Error(), k.pin) != 1 || strings.Contains(err.Error(), "654321") {
				t.Errorf("wrong PIN: %v", err)
			}
		})
	}
	g.Wait()
	if n := logins(); n != 1 {
		t.Fatalf("%d logins with one wrong PIN", n)
	}
	write(t, k.pin, "123456")
	wrap(t, h, "a", 1)
	if n := logins(); n != 2 {
		t.Errorf("%d logins after the PIN was corrected", n)
	}
	h.Close()

	write(t, dir+"/final-try", "")
	h = k.open()
	if _, _, err := h.Wrap(t.Context(), "a", kmstest.Secret); !errors.Is(err, kms.ErrForbidden) || !strings.Contains(err.Error(), "one more wrong PIN") {
		t.Errorf("final try: %v", err)
	}
	if n := logins(); n != 2 {
		t.Errorf("%d logins, one of them the final try", n)
	}
	os.Remove(dir + "/final-try")
	wrapsAgain(t, h, "a")
}

func TestHSMRemoved(t *testing.T) {
	k := newToken(t, "a")
	dir := k.faulty()
	write(t, dir+"/removed", "")
	h := k.open()
	kmstest.Refuses(t, "not there yet", h, "a", make([]byte, 60), kms.ErrUnavailable)
	os.Remove(dir + "/removed")
	wrapsAgain(t, h, "a")
	wrapped := wrap(t, h, "a", 1)
	write(t, dir+"/removed", "")
	kmstest.Refuses(t, "removed", h, "a", wrapped, kms.ErrUnavailable)
	if _, err := h.Rotate(t.Context(), "a"); !errors.Is(err, kms.ErrUnavailable) {
		t.Errorf("rotate: %v", err)
	}
	os.Remove(dir + "/removed")
	wrapsAgain(t, h, "a")
	unwrap(t, h, "a", 1, wrapped)

	write(t, dir+"/forgotten", "")
	unwrap(t, h, "a", 1, wrapped)
	if _, err := os.Stat(dir + "/forgotten"); err == nil {
		t.Error("the sessions were not forgotten")
	}
	write(t, dir+"/forgotten", "")
	if version, err := h.Rotate(t.Context(), "a"); err != nil || version != 2 {
		t.Errorf("rotate after the sessions were forgotten: %d, %v", version, err)
	}

	// SoftHSM itself finds nothing any more, even when its files are back.
	if err := os.Rename(k.dir+"/tokens", k.dir+"/away"); err != nil {
		t.Fatal(err)
	}
	kmstest.Refuses(t, "files removed", h, "a", wrapped, kms.ErrUnavailable)
	if err := os.Rename(k.dir+"/away", k.dir+"/tokens"); err != nil {
		t.Fatal(err)
	}
	wrapsAgain(t, h, "a")
	unwrap(t, h, "a", 1, wrapped)
}

func TestHSMSlow(t *testing.T) {
	k := newToken(t, "a")
	dir := k.faulty()
	h := k.open()
	wrapped := wrap(t, h, "a", 1)
	write(t, dir+"/slow", "")
	kmstest.TimesOut(t, "hangs", h, "a")
	var g sync.WaitGroup
	for range 20 {
		g.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			if _, _, err := h.Wrap(ctx, "a", kmstest.Secret); !errors.Is(err, kms.ErrUnavailable) {
				t.Error(err)
			}
		})
	}
	g.Wait()
	os.Remove(dir + "/slow")
	unwrap(t, h, "a", 1, wrapped)
	wrap(t, h, "a", 1)
}

func TestHSMPeculiar(t *testing.T) {
	k := newToken(t, "a", "b")
	dir := k.faulty()
	h := k.open()
	write(t, dir+"/own-nonce", "")
	kmstest.CheckWrapper(t, h, "a", "b")
	if bytes.Equal(wrap(t, h, "a", 1)[:12], make([]byte, 12)) {
		t.Error("the nonce is zero")
	}
	write(t, dir+"/no-change", "")
	if _, err := h.Rotate(t.Context(), "a"); !errors.Is(err, kms.ErrForbidden) || !strings.Contains(err.Error(), "not in use") {
		t.Errorf("rotate: %v", err)
	}
	if _, _, handles := k.find(""); len(handles) != 2 {
		t.Errorf("%d keys after a rotation that failed", len(handles))
	}
}

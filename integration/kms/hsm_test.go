package kms

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/kms/kmstest"
	pkcs11kms "github.com/ctrlplane/pilot/copilot/kms/pkcs11"
	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/miekg/pkcs11"
)

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
	harness.Await(t, "wrap with "+path, func() error {
		_, _, err := w.Wrap(t.Context(), path, kmstest.Secret)
		return err
	})
}

func TestHSM(t *testing.T) {
	k := harness.NewHSMToken(t, "a", "b")
	h := k.Open()
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

	p, s, handles := k.Find("a")
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
	k.Add("wide", "01", 32)
	k.Add("wide", "0100", 32)
	k.Add("wide", "00ff", 32)
	wrap(t, h, "wide", 256)
	if version, err := h.Rotate(t.Context(), "wide"); err != nil || version != 257 {
		t.Errorf("rotate: %d, %v", version, err)
	}
	kmstest.Refuses(t, "missing", h, "missing", first, kms.ErrNotFound)
	if version, err := h.Rotate(t.Context(), "missing"); !errors.Is(err, kms.ErrNotFound) {
		t.Errorf("rotate what is not there: %d, %v", version, err)
	}
	k.Add("small", "01", 16)
	kmstest.Refuses(t, "AES-128", h, "small", first, kms.ErrNotFound)
	k.Add("zero", "00", 32)
	kmstest.Refuses(t, "version 0", h, "zero", first, kms.ErrNotFound)
	k.Add("twice", "01", 32)
	k.Add("twice", "0001", 32)
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
	k := harness.NewHSMToken(t)
	for want, settings := range map[string]string{
		"absolute path":     "module = 'libsofthsm2.so'\ntoken = 'copilot'\npin-file = '" + k.Pin + "'",
		"module:":           "module = '/nonexistent.so'\ntoken = 'copilot'\npin-file = '" + k.Pin + "'",
		"the token's label": "module = '" + harness.SoftHSMModule + "'\npin-file = '" + k.Pin + "'",
		"a file with":       "module = '" + harness.SoftHSMModule + "'\ntoken = 'copilot'",
		"no such file":      "module = '" + harness.SoftHSMModule + "'\ntoken = 'copilot'\npin-file = '/nonexistent'",
		"not one line":      "module = '" + harness.SoftHSMModule + "'\ntoken = 'copilot'\npin-file = '" + harness.Write(t, k.Dir+"/empty", "\n") + "'",
		"strict mode":       k.Settings() + "slot = 1",
	} {
		if _, err := pkcs11kms.Types().Open("pkcs11", kmstest.Settings(settings)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	if err := os.Chmod(k.Pin, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := pkcs11kms.Types().Open("pkcs11", kmstest.Settings(k.Settings())); err == nil || !strings.Contains(err.Error(), "chmod 0600") {
		t.Errorf("a PIN for everybody: %v", err)
	}
	if err := os.Chmod(k.Pin, 0o600); err != nil {
		t.Fatal(err)
	}

	// These open, as the HSM may be away.
	for want, settings := range map[string]string{
		`only "copilot"`:  strings.Replace(k.Settings(), "'copilot'", "'another'", 1),
		"serial number":   strings.Replace(k.Settings(), "token =", "serial =", 1),
		"can't be loaded": strings.Replace(k.Settings(), harness.SoftHSMModule, harness.Bin+"/copilot", 1),
	} {
		b, err := pkcs11kms.Types().Open("pkcs11", kmstest.Settings(settings))
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := b.(kms.Wrapper).Wrap(t.Context(), "a", kmstest.Secret); !errors.Is(err, kms.ErrUnavailable) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
		b.Close()
	}
}

// TestHSMManyCallsAtOnce has many calls at once in one process.
func TestHSMManyCallsAtOnce(t *testing.T) {
	k := harness.NewHSMToken(t, "a")
	h := k.Open()
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
			for deadline := time.Now().Add(harness.Timeout); errors.Is(err, kms.ErrUnavailable) && time.Now().Before(deadline); {
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
	k := harness.NewHSMToken(t, "a")
	harness.GoBuild(t, "", k.Dir+"/hsmrotate", "./integration/testdata/hsmrotate")
	const brokers, times = 4, 5
	outputs := make([]string, brokers)
	var g sync.WaitGroup
	for i := range outputs {
		cmd := harness.Command(t, k.Dir+"/hsmrotate", k.Settings(), "a", fmt.Sprint(times))
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
	h := k.Open()
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
	if _, _, handles := k.Find("a"); len(made) != brokers*times || len(handles) != 1+len(made) || wrapped != 5*brokers*times {
		t.Errorf("%d versions made, %d keys, %d wrapped", len(made), len(handles), wrapped)
	}
}

func TestHSMWrongPIN(t *testing.T) {
	k := harness.NewHSMToken(t, "a")
	dir := k.Faulty()
	logins := func() int {
		b, _ := os.ReadFile(dir + "/logins")
		return len(b)
	}
	harness.Write(t, k.Pin, "654321\n")
	h := k.Open()
	var g sync.WaitGroup
	for range 10 {
		g.Go(func() {
			if _, _, err := h.Wrap(t.Context(), "a", kmstest.Secret); !errors.Is(err, kms.ErrForbidden) ||
				strings.Count(err.Error(), "CKR_PIN_INCORRECT") != 1 || strings.Count(err.Error(), k.Pin) != 1 || strings.Contains(err.Error(), "654321") {
				t.Errorf("wrong PIN: %v", err)
			}
		})
	}
	g.Wait()
	if n := logins(); n != 1 {
		t.Fatalf("%d logins with one wrong PIN", n)
	}
	harness.Write(t, k.Pin, "123456")
	wrap(t, h, "a", 1)
	if n := logins(); n != 2 {
		t.Errorf("%d logins after the PIN was corrected", n)
	}
	h.Close()

	harness.Write(t, dir+"/final-try", "")
	h = k.Open()
	if _, _, err := h.Wrap(t.Context(), "a", kmstest.Secret); !errors.Is(err, kms.ErrForbidden) || !strings.Contains(err.Error(), "one more wrong PIN") {
		t.Errorf("final try: %v", err)
	}
	if n := logins(); n != 2 {
		t.Errorf("%d logins, one of them the final try", n)
	}
	os.Remove(dir + "/final-try")
	wrapsAgain(t, h, "a")
}

func TestHSMTokenRemovedAndBack(t *testing.T) {
	k := harness.NewHSMToken(t, "a")
	dir := k.Faulty()
	harness.Write(t, dir+"/removed", "")
	h := k.Open()
	kmstest.Refuses(t, "not there yet", h, "a", make([]byte, 60), kms.ErrUnavailable)
	os.Remove(dir + "/removed")
	wrapsAgain(t, h, "a")
	wrapped := wrap(t, h, "a", 1)
	harness.Write(t, dir+"/removed", "")
	kmstest.Refuses(t, "removed", h, "a", wrapped, kms.ErrUnavailable)
	if _, err := h.Rotate(t.Context(), "a"); !errors.Is(err, kms.ErrUnavailable) {
		t.Errorf("rotate: %v", err)
	}
	os.Remove(dir + "/removed")
	wrapsAgain(t, h, "a")
	unwrap(t, h, "a", 1, wrapped)

	harness.Write(t, dir+"/forgotten", "")
	unwrap(t, h, "a", 1, wrapped)
	if _, err := os.Stat(dir + "/forgotten"); err == nil {
		t.Error("the sessions were not forgotten")
	}
	harness.Write(t, dir+"/forgotten", "")
	if version, err := h.Rotate(t.Context(), "a"); err != nil || version != 2 {
		t.Errorf("rotate after the sessions were forgotten: %d, %v", version, err)
	}

	// SoftHSM itself finds nothing any more, even when its files are back.
	if err := os.Rename(k.Dir+"/tokens", k.Dir+"/away"); err != nil {
		t.Fatal(err)
	}
	kmstest.Refuses(t, "files removed", h, "a", wrapped, kms.ErrUnavailable)
	if err := os.Rename(k.Dir+"/away", k.Dir+"/tokens"); err != nil {
		t.Fatal(err)
	}
	wrapsAgain(t, h, "a")
	unwrap(t, h, "a", 1, wrapped)
}

func TestHSMSlowModuleTimesOut(t *testing.T) {
	k := harness.NewHSMToken(t, "a")
	dir := k.Faulty()
	h := k.Open()
	wrapped := wrap(t, h, "a", 1)
	harness.Write(t, dir+"/slow", "")
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

func TestHSMWithOwnNonceWrapsAndRotationIsRefused(t *testing.T) {
	k := harness.NewHSMToken(t, "a", "b")
	dir := k.Faulty()
	h := k.Open()
	harness.Write(t, dir+"/own-nonce", "")
	kmstest.CheckWrapper(t, h, "a", "b")
	if bytes.Equal(wrap(t, h, "a", 1)[:12], make([]byte, 12)) {
		t.Error("the nonce is zero")
	}
	harness.Write(t, dir+"/no-change", "")
	if _, err := h.Rotate(t.Context(), "a"); !errors.Is(err, kms.ErrForbidden) || !strings.Contains(err.Error(), "not in use") {
		t.Errorf("rotate: %v", err)
	}
	if _, _, handles := k.Find(""); len(handles) != 2 {
		t.Errorf("%d keys after a rotation that failed", len(handles))
	}
}

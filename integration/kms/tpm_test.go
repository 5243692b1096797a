package kms

import (
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/kms/kmstest"
	"github.com/ctrlplane/pilot/copilot/kms/tpm"
	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

func openTPM(t *testing.T, settings string) kms.Wrapper {
	t.Helper()
	b, err := tpm.Types().Open("tpm", kmstest.Settings(settings))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b.(kms.Wrapper)
}

func TestTPMOpensWhatItSealed(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.TPM)
	p := harness.NewTPM(t)
	device := "device = '" + p.Socket + "'\n"
	plain, policy := openTPM(t, device), openTPM(t, device+"pcrs = 'sha256:11,7'")
	for range 4 { // more than it has room for
		kmstest.CheckWrapper(t, plain, "a", "b")
		kmstest.CheckWrapper(t, policy, "a", "b")
	}
	wrapped, bound := wrap(t, plain, "a", 1), wrap(t, policy, "a", 1)

	// Another policy, and none.
	cross := func(what string, w kms.Wrapper, wrapped []byte, want ...string) {
		t.Helper()
		_, err := w.Unwrap(t.Context(), "a", 1, wrapped)
		isKMSError(t, err, kms.ErrForbidden, append(want, what)...)
	}
	cross(`pcrs = "", and the configuration has pcrs = "sha256:7,11"`, policy, wrapped)
	cross(`pcrs = "sha256:7,11", and the configuration has pcrs = ""`, plain, bound)

	// Other software.
	p.Extend(t, 11, "another kernel")
	cross("the PCRs are not as they were", policy, bound)
	unwrap(t, plain, "a", 1, wrapped)
	p.Reboot(t)
	cross("the PCRs are not as they were", policy, bound)
	p.Extend(t, 7, "firmware")
	unwrap(t, policy, "a", 1, bound)
	unwrap(t, plain, "a", 1, wrapped)

	p.Tool(t, "tpm2_pcrallocate", "sha512:none")
	p.Reboot(t)
	p.Extend(t, 7, "firmware")

	// What every program could have set, and what is not there.
	for settings, want := range map[string]string{
		"pcrs = 'sha256:8'":    "nothing was measured into sha256:8",
		"pcrs = 'sha256:17,8'": "nothing was measured into",
		"pcrs = 'sha512:7'":    "no PCR 7 in the bank sha512: that bank is off",
	} {
		_, _, err := openTPM(t, device+settings).Wrap(t.Context(), "a", kmstest.Secret)
		isKMSError(t, err, kms.ErrForbidden, want)
	}
	for settings, want := range map[string]string{
		"pcrs = 'sha256:'":     "is not a PCR from 0 to 23",
		"pcrs = 'sha256:24'":   "is not a PCR from 0 to 23",
		"pcrs = 'sha256:7,,8'": "is not a PCR from 0 to 23",
		"pcrs = 'sha256:7,16'": "every program can reset PCR 16",
		"pcrs = 'sha1:7'":      "give a bank",
		"pcrs = '7'":           "give a bank",
		"device = 'tpm0'":      "absolute path",
	} {
		kmstest.Opens(t, tpm.Types(), "tpm", settings, want)
	}

	// An owner with a password: the key that was made persistent before is used.
	zeros := "\x20\x00" + strings.Repeat("\x00", 128)
	p.Tool(t, "tpm2_createprimary", "-u", harness.Write(t, p.Dir+"/unique", zeros+zeros), "-C", "o", "-g", "sha256", "-G", "ecc:aes128cfb", "-c", p.Dir+"/srk",
		"-a", "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|decrypt")
	p.Tool(t, "tpm2_evictcontrol", "-C", "o", "-c", p.Dir+"/srk", "0x81000001")
	p.Tool(t, "tpm2_flushcontext", "-t")
	p.Tool(t, "tpm2_changeauth", "-c", "o", "secret")
	unwrap(t, plain, "a", 1, wrapped)
	kmstest.CheckWrapper(t, plain, "a", "b")

	// Another machine's, then cleared, then gone.
	p.Tool(t, "tpm2_changeauth", "-c", "o", "-p", "secret")
	other := openTPM(t, "device = '"+harness.NewTPM(t).Socket+"'")
	_, err := other.Unwrap(t.Context(), "a", 1, wrapped)
	isKMSError(t, err, kms.ErrUnwrap, "another TPM sealed it, or this one was cleared")
	p.Tool(t, "tpm2_clear")
	_, err = plain.Unwrap(t.Context(), "a", 1, wrapped)
	isKMSError(t, err, kms.ErrUnwrap, "another TPM sealed it, or this one was cleared")
	p.Process.Stop(t)
	kmstest.Refuses(t, "stopped", plain, "a", wrapped, kms.ErrUnavailable)
}

func TestTPMThatHangs(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.TPM)
	p := harness.NewTPM(t)
	w := openTPM(t, "device = '"+p.Socket+"'")
	wrapped := wrap(t, w, "a", 1)
	resume := p.Process.Pause(t)
	kmstest.TimesOut(t, "paused", w, "a")
	kmstest.TimesOut(t, "paused, and another call waits", w, "a")
	resume()
	unwrap(t, w, "a", 1, wrapped)
}

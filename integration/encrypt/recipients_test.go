package encrypt

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// TestEachRecipientDecrypts encrypts for each kind of recipient that needs no broker, and
// decrypts with its key and with no other.
func TestEachRecipientDecrypts(t *testing.T) {
	fipstest.Refused(t, fipstest.JWE)
	dir := harness.TempDir(t)
	conf := harness.Write(t, dir+"/ocicrypt.conf", `{"key-providers": {}}`)
	c := harness.NewNode(t, dir+"/ci", harness.Containerd2(), conf, "")
	private, public := harness.KeyPair(t, dir+"/keys")
	other, _ := harness.KeyPair(t, dir+"/other")
	cert := dir + "/cert.pem"
	harness.Output(t, harness.Command(t, "openssl", "req", "-x509", "-key", private, "-subj", "/CN=test", "-out", cert))
	gpg := dir + "/gpg"
	if err := os.MkdirAll(gpg, 0o700); err != nil {
		t.Fatal(err)
	}
	harness.Output(t, harness.Command(t, "gpg", "--homedir", gpg, "--batch", "--passphrase", "", "--quick-gen-key", "test@example.com", "default", "default", "never"))
	t.Cleanup(func() { exec.Command("gpgconf", "--homedir", gpg, "--kill", "all").Run() })
	harness.Write(t, gpg+"/secret.gpg", harness.Output(t, harness.Command(t, "gpg", "--homedir", gpg, "--batch", "--export-secret-keys", "test@example.com")))
	hsm := harness.ImportHSMKey(t, dir+"/hsm", private)

	secret := harness.NewSecret()
	l := harness.NewLayout(t)
	harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", l.Tar(dir+"/image.tar", "example.com/app:1", l.Image(harness.LayerKinds[1], false, harness.Arch, secret))))
	for i, r := range []struct{ scheme, recipient, key, more string }{
		{"jwe", "jwe:" + public, private, ""},
		{"pkcs7", "pkcs7:" + cert, private, "--dec-recipient=pkcs7:" + cert},
		{"pgp", "pgp:test@example.com", gpg + "/secret.gpg", "--gpg-homedir=" + gpg},
		{"pkcs11", "pkcs11:" + public, hsm, ""},
		{"pkcs11", "pkcs11:" + hsm, hsm, ""},
	} {
		name := fmt.Sprintf("example.com/app:%s-%d", r.scheme, i)
		args := []string{"images", "encrypt", "--recipient", r.recipient, "--gpg-homedir", gpg, "example.com/app:1", name}
		harness.Output(t, c.CtrPilot(args...))
		if out := harness.Output(t, c.CtrPilot("images", "layerinfo", name)); strings.Count(out, r.scheme) < 2 {
			t.Errorf("layerinfo:\n%s", out)
		}
		decrypt := []string{"images", "decrypt", "--key", r.key}
		if r.more != "" {
			decrypt = append(decrypt, r.more)
		}
		harness.Output(t, c.CtrPilot(append(decrypt, name, name+"-plain")...))
		if got, want := c.Target(name+"-plain"), c.Target("example.com/app:1"); got != want {
			t.Errorf("%s: decrypted to %s, was %s", r.scheme, got, want)
		}
		harness.ExpectFailure(t, c.CtrPilot("images", "decrypt", "--key", other, name, name+"-no"), "layer sha256:")
	}
	harness.ExpectFailure(t, c.CtrPilot("images", "encrypt", "--recipient", "provider:nobody:x", "example.com/app:1", "x"), `key provider "nobody" is not configured`)
	harness.ExpectFailure(t, c.CtrPilot("images", "encrypt", "--recipient", "jwe:"+private+"x", "example.com/app:1", "x"), "no such file")
	harness.ExpectFailure(t, c.CtrPilot("images", "encrypt", "example.com/app:1", "x"), "no recipient")
	harness.ExpectFailure(t, c.CtrPilot("images", "encrypt", "--recipient", "jwe:"+public, "example.com/nobody:1"), "not found")
	c.ExpectNothingPending()
}

// TestInterruptedEncryptionLeavesNothing stops ctr-pilot in the middle of an encryption.
func TestInterruptedEncryptionLeavesNothing(t *testing.T) {
	fipstest.Refused(t, fipstest.JWE)
	harness.Long(t)
	t.Parallel()
	dir := harness.TempDir(t)
	conf := harness.Write(t, dir+"/ocicrypt.conf", `{"key-providers": {}}`)
	c := harness.NewNode(t, dir+"/ci", harness.Containerd2(), conf, "")
	_, public := harness.KeyPair(t, dir+"/keys")
	l := harness.NewLayout(t)
	k := harness.LayerKinds[0]
	big := make([]byte, 200<<20)
	layer, id := l.Layer(k, k.OCI, map[string][]byte{"big": big})
	harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", l.Tar(dir+"/image.tar", "example.com/big:1", l.Manifest([]harness.Object{layer}, []string{id}))))
	blobs := func() []string {
		return strings.Fields(harness.Output(t, c.CtrPilot("content", "list", "-q")))
	}
	before := blobs()

	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL} {
		name := fmt.Sprintf("example.com/big:%d", signal)
		interrupt := func() error {
			cmd := c.CtrPilot("images", "encrypt", "--recipient", "jwe:"+public, "example.com/big:1", name)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			done := make(chan error)
			go func() { done <- cmd.Wait() }()
			for {
				if entries, _ := filepath.Glob(dir + "/ci/root/io.containerd.content.v1.content/ingest/*"); len(entries) > 0 {
					cmd.Process.Signal(signal)
					return <-done
				}
				select {
				case err := <-done:
					return err
				case <-time.After(time.Millisecond):
				}
			}
		}
		for tries := 1; interrupt() == nil; tries++ {
			if tries == 10 {
				t.Fatalf("%s: it was always done before it was stopped", signal)
			}
			harness.Output(t, c.CtrPilot("images", "remove", "--sync", name))
		}
		if out := harness.Output(t, c.CtrPilot("images", "list", "-q")); strings.TrimSpace(out) != "example.com/big:1" {
			t.Errorf("%s: images: %s", signal, out)
		}
		if signal == syscall.SIGKILL {
			break // its lease stays until it expires
		}
		c.ExpectNothingPending()
		for _, blob := range blobs() {
			if !slices.Contains(before, blob) {
				t.Errorf("%s: left behind blob %s", signal, blob)
			}
		}
	}
	// The next try works.
	harness.Output(t, c.CtrPilot("images", "encrypt", "--recipient", "jwe:"+public, "example.com/big:1", "example.com/big:encrypted"))
}

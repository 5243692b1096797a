package integration

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
)

// TestRecipients encrypts for each kind of recipient that needs no broker, and
// decrypts with its key and with no other.
func TestRecipients(t *testing.T) {
	dir := tempDir(t)
	conf := write(t, dir+"/ocicrypt.conf", `{"key-providers": {}}`)
	c := newNode(t, dir+"/ci", containerd2(), conf, "")
	private, public := keyPair(t, dir+"/keys")
	other, _ := keyPair(t, dir+"/other")
	cert := dir + "/cert.pem"
	output(t, command(t, "openssl", "req", "-x509", "-key", private, "-subj", "/CN=test", "-out", cert))
	gpg := dir + "/gpg"
	if err := os.MkdirAll(gpg, 0o700); err != nil {
		t.Fatal(err)
	}
	output(t, command(t, "gpg", "--homedir", gpg, "--batch", "--passphrase", "", "--quick-gen-key", "test@example.com", "default", "default", "never"))
	t.Cleanup(func() { exec.Command("gpgconf", "--homedir", gpg, "--kill", "all").Run() })
	write(t, gpg+"/secret.gpg", output(t, command(t, "gpg", "--homedir", gpg, "--batch", "--export-secret-keys", "test@example.com")))
	hsm := hsmKey(t, dir+"/hsm", private)

	secret := newSecret()
	l := newLayout(t)
	output(t, c.ctrPilot("images", "import", "--no-unpack", l.tar(dir+"/image.tar", "example.com/app:1", l.image(kinds[1], false, goarch, secret))))
	for i, r := range []struct{ scheme, recipient, key, more string }{
		{"jwe", "jwe:" + public, private, ""},
		{"pkcs7", "pkcs7:" + cert, private, "--dec-recipient=pkcs7:" + cert},
		{"pgp", "pgp:test@example.com", gpg + "/secret.gpg", "--gpg-homedir=" + gpg},
		{"pkcs11", "pkcs11:" + public, hsm, ""},
		{"pkcs11", "pkcs11:" + hsm, hsm, ""},
	} {
		name := fmt.Sprintf("example.com/app:%s-%d", r.scheme, i)
		args := []string{"images", "encrypt", "--recipient", r.recipient, "--gpg-homedir", gpg, "example.com/app:1", name}
		output(t, c.ctrPilot(args...))
		if out := output(t, c.ctrPilot("images", "layerinfo", name)); strings.Count(out, r.scheme) < 2 {
			t.Errorf("layerinfo:\n%s", out)
		}
		decrypt := []string{"images", "decrypt", "--key", r.key}
		if r.more != "" {
			decrypt = append(decrypt, r.more)
		}
		output(t, c.ctrPilot(append(decrypt, name, name+"-plain")...))
		if got, want := c.target(name+"-plain"), c.target("example.com/app:1"); got != want {
			t.Errorf("%s: decrypted to %s, was %s", r.scheme, got, want)
		}
		fails(t, c.ctrPilot("images", "decrypt", "--key", other, name, name+"-no"), "layer sha256:")
	}
	fails(t, c.ctrPilot("images", "encrypt", "--recipient", "provider:nobody:x", "example.com/app:1", "x"), `key provider "nobody" is not configured`)
	fails(t, c.ctrPilot("images", "encrypt", "--recipient", "jwe:"+private+"x", "example.com/app:1", "x"), "no such file")
	fails(t, c.ctrPilot("images", "encrypt", "example.com/app:1", "x"), "no recipient")
	fails(t, c.ctrPilot("images", "encrypt", "--recipient", "jwe:"+public, "example.com/nobody:1"), "not found")
	c.nothingPending()
}

// hsmKey puts a private key into a new token of SoftHSM and returns the YAML
// file that tells ocicrypt where it is.
func hsmKey(t testing.TB, dir, private string) string {
	t.Helper()
	if err := os.MkdirAll(dir+"/tokens", 0o700); err != nil {
		t.Fatal(err)
	}
	conf := write(t, dir+"/softhsm2.conf", "directories.tokendir = "+dir+"/tokens\nobjectstore.backend = file\n")
	t.Setenv("SOFTHSM2_CONF", conf)
	t.Setenv("OCICRYPT_CONFIG", "internal")
	// SoftHSM knows no other hash for OAEP.
	t.Setenv("OCICRYPT_OAEP_HASHALG", "sha1")
	output(t, command(t, "openssl", "pkcs8", "-topk8", "-nocrypt", "-in", private, "-out", dir+"/key.p8"))
	output(t, command(t, "softhsm2-util", "--init-token", "--free", "--label", "pilot", "--pin", "1234", "--so-pin", "1234"))
	output(t, command(t, "softhsm2-util", "--import", dir+"/key.p8", "--token", "pilot", "--label", "image", "--id", "a1", "--pin", "1234"))
	return write(t, dir+"/key.yaml", "pkcs11:\n  uri: pkcs11:token=pilot;id=%A1;object=image;type=private?pin-value=1234&module-name=softhsm2\nmodule:\n  env:\n    SOFTHSM2_CONF: "+conf+"\n")
}

// TestInterrupted stops ctr-pilot in the middle of an encryption.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	conf := write(t, dir+"/ocicrypt.conf", `{"key-providers": {}}`)
	c := newNode(t, dir+"/ci", containerd2(), conf, "")
	_, public := keyPair(t, dir+"/keys")
	l := newLayout(t)
	k := kinds[0]
	big := make([]byte, 200<<20)
	layer, id := l.layer(k, k.oci, map[string][]byte{"big": big})
	output(t, c.ctrPilot("images", "import", "--no-unpack", l.tar(dir+"/image.tar", "example.com/big:1", l.manifest([]object{layer}, []string{id}))))
	blobs := func() []string {
		return strings.Fields(output(t, c.ctrPilot("content", "list", "-q")))
	}
	before := blobs()

	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL} {
		name := fmt.Sprintf("example.com/big:%d", signal)
		interrupt := func() error {
			cmd := c.ctrPilot("images", "encrypt", "--recipient", "jwe:"+public, "example.com/big:1", name)
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
			output(t, c.ctrPilot("images", "remove", "--sync", name))
		}
		if out := output(t, c.ctrPilot("images", "list", "-q")); strings.TrimSpace(out) != "example.com/big:1" {
			t.Errorf("%s: images: %s", signal, out)
		}
		if signal == syscall.SIGKILL {
			break // its lease stays until it expires
		}
		c.nothingPending()
		for _, blob := range blobs() {
			if !slices.Contains(before, blob) {
				t.Errorf("%s: left behind blob %s", signal, blob)
			}
		}
	}
	// The next try works.
	output(t, c.ctrPilot("images", "encrypt", "--recipient", "jwe:"+public, "example.com/big:1", "example.com/big:encrypted"))
}

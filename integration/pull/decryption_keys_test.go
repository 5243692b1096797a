package pull

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// strayFiles puts a file of each kind that is no key into a directory, and says
// why it is not one. A reason is empty if there is nothing to be said.
func strayFiles(t testing.TB, dir string) map[string]struct {
	put    func(path string)
	reason string
} {
	private, public := harness.KeyPair(t, dir+"/stray")
	key := harness.Read(t, private)
	openssl := func(name string, args ...string) string {
		harness.Output(t, harness.Command(t, "openssl", append(args, "-out", dir+"/"+name)...))
		return harness.Read(t, dir+"/"+name)
	}
	password := openssl("password.pem", "pkey", "-in", private, "-aes256", "-passout", "pass:secret")
	legacy := openssl("legacy.pem", "rsa", "-in", private, "-traditional", "-aes128", "-passout", "pass:secret")
	sec1 := openssl("secp256k1.pem", "ecparam", "-name", "secp256k1", "-genkey")
	file := func(content string) func(string) { return func(path string) { harness.Write(t, path, content) } }
	link := func(target string) func(string) {
		return func(path string) {
			if err := os.Symlink(target, path); err != nil {
				t.Fatal(err)
			}
		}
	}
	return map[string]struct {
		put    func(path string)
		reason string
	}{
		"README":        {file("The keys of this node.\n"), "neither a private key nor a certificate"},
		"public.pem":    {file(harness.Read(t, public)), "a public key"},
		"password.pem":  {file(password), "a private key with a password"},
		"legacy.pem":    {file(legacy), "a private key with a password"},
		"secp256k1.pem": {file(sec1), "on another curve than P-256, P-384 and P-521"},
		"key.pem.tmp":   {file(key[:len(key)/2]), "damaged or only half written"},
		"null":          {file(""), "empty"},
		"huge":          {file(key + strings.Repeat("\n", 2<<20)), "larger than 1024 KiB"},
		"key.yaml":      {file("pkcs11:\n  uri: pkcs11:token=pilot;id=%A1;object=image?pin-value=1234&module-name=softhsm2\n"), "a PKCS#11 key"},
		"dangling":      {link("nowhere"), "a link to"},
		"loop":          {link("loop"), "a loop of links"},
		"self":          {link("."), ""},
		"pipe": {func(path string) {
			if err := syscall.Mkfifo(path, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "not a file but a pipe"},
		"directory": {func(path string) {
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
		}, ""},
		"many": {func(path string) {
			for i := range 5000 {
				harness.Write(t, fmt.Sprintf("%s/%d", path, i), "")
			}
		}, "empty"},
	}
}

// TestDecryptionKeys has keys come and go in the directory of a node that
// decrypts with its differ or with the stream processor, with files of all kinds
// beside them.
func TestDecryptionKeys(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.JWE)
	dir := harness.TempDir(t)
	conf := harness.Write(t, dir+"/ocicrypt.conf", `{"key-providers": {}}`)
	c := harness.NewCI(t, dir+"/ci", conf)
	private, public := harness.KeyPair(t, dir+"/keys")
	encrypted := c.Image(harness.LayerKinds[1], "jwe:"+public)
	plain := encrypted + "-plain"
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", plain))
	stray := strayFiles(t, dir)

	for _, v := range []harness.ContainerdVersion{harness.Containerd2(), harness.Containerd17(), harness.Containerd16()} {
		t.Run(v.Name, func(t *testing.T) {
			if v.Name == harness.Containerd17().Name { // as 2.4, by the differ
				harness.Long(t)
			}
			home := harness.TempDir(t)
			keys := home + "/keys"
			differ := v.Name != harness.Containerd16().Name
			var n *harness.Node
			if differ {
				harness.StartPilot(t, home, "unix://"+home+"/nobody.sock", "--decryption-keys-path", keys, "--admin-listen", "unix://"+home+"/admin.sock")
				n = harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: v})
			} else {
				n = harness.NewNode(t, home, v, conf, keys)
			}
			works := func(image string) {
				t.Helper()
				harness.Output(t, n.Crictl("pull", image))
				harness.Output(t, n.Crictl("rmi", image))
			}
			refused := func(want ...string) {
				t.Helper()
				works(plain)
				harness.ExpectFailure(t, n.Crictl("pull", encrypted), append(want, "layer sha256:", "no key unwraps the layer key: jwe: no private key was given")...)
			}
			counted := func(usable, unusable int) {
				t.Helper()
				if !differ {
					return
				}
				metrics := harness.AdminGet(t, home+"/admin.sock", "/metrics")
				for state, count := range map[string]int{"usable": usable, "unusable": unusable} {
					if want := fmt.Sprintf("\npilot_decryption_keys{state=%q} %d\n", state, count); !strings.Contains(metrics, want) {
						_, rest, _ := strings.Cut(metrics, "TYPE pilot_decryption_keys")
						t.Errorf("want %q in %.300s", want, rest)
					}
				}
			}

			refused(keys + `" is missing: it does not exist`)
			counted(0, 1)
			key := harness.Write(t, keys+"/node.pem", harness.Read(t, private))
			works(encrypted)
			counted(1, 0)

			reasons := 0
			for name, s := range stray {
				path := filepath.Join(keys, name)
				s.put(path)
				if s.reason != "" {
					reasons++
				}
				if v.Number < 3 {
					continue // all at once
				}
				works(plain)
				works(encrypted)
				if s.reason != "" {
					if err := os.Rename(key, home+"/node.pem"); err != nil {
						t.Fatal(err)
					}
					refused("decryption keys: ", s.reason)
					if err := os.Rename(home+"/node.pem", key); err != nil {
						t.Fatal(err)
					}
				}
				if err := os.RemoveAll(path); err != nil {
					t.Fatal(err)
				}
			}
			if v.Number > 2 {
				for name, s := range stray {
					s.put(filepath.Join(keys, name))
				}
			}
			works(plain)
			works(encrypted)
			if err := os.RemoveAll(keys + "/many"); err != nil {
				t.Fatal(err)
			}
			reasons--
			counted(1, reasons)
			if v.Number > 2 {
				examined := harness.NewDoctorNode(t, n).Examine(t, "--decryption-keys-path", keys)
				for name, s := range stray {
					if s.reason != "" && name != "many" {
						examined.ExpectFailed(t, "decryption-keys", "ls -la "+keys, filepath.Join(keys, name), s.reason, "keys that can be used: 1")
					}
				}
			}

			if err := os.Remove(key); err != nil {
				t.Fatal(err)
			}
			refused("decryption keys: ", `/dangling" is a link to`, "more can't be used")
			if err := os.RemoveAll(keys); err != nil {
				t.Fatal(err)
			}
			harness.Write(t, key, harness.Read(t, private))
			works(encrypted)
			counted(1, 0)
			if v.Number > 2 {
				for _, s := range harness.NewDoctorNode(t, n).Examine(t, "--decryption-keys-path", keys).Steps {
					if s.Name == "decryption-keys" && s.Result != "ok" {
						t.Errorf("%+v", s)
					}
				}
			}
			if differ {
				checkKeyLog(t, harness.Read(t, home+"/pilot.log"), keys, key, len(stray))
				n.ExpectNoTraces(t)
			}
		})
	}
}

// checkKeyLog checks that a log names unusable files, not for each layer, and
// has no key in it.
func checkKeyLog(t testing.TB, log, keys, key string, changes int) {
	t.Helper()
	for _, secret := range append(strings.Split(harness.Read(t, key), "\n")[1:3], "pin-value", "BEGIN") {
		if strings.Contains(log, secret) {
			t.Errorf("%q is in the log", secret)
		}
	}
	if !strings.Contains(log, `level=warning msg="decryption key not usable" file=`+keys+`/README reason="neither a private key nor a certificate`) {
		t.Errorf("the log does not name README:\n%.3000s", log)
	}
	var lines []string
	for line := range strings.Lines(log) {
		if _, state, ok := strings.Cut(line, `msg="decryption keys read"`); ok {
			lines = append(lines, state)
		}
	}
	// One for each change of what can be used, and there is one layer at least
	// between two.
	if len(lines) == 0 || len(lines) > 4*changes {
		t.Errorf("%d lines for %d files: %q", len(lines), changes, lines)
	}
}

// TestServeWithAnyKeys starts pilot with each kind of file in the place of its
// keys.
func TestServeWithAnyKeys(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.JWE)
	dir := harness.TempDir(t)
	for name, s := range strayFiles(t, dir) {
		for where, path := range map[string]string{"in": dir + "/" + name + ".d/" + name, "as": dir + "/at/" + name} {
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			s.put(path)
			home := filepath.Join(dir, where, name)
			keys := path
			if where == "in" {
				keys = filepath.Dir(path)
			}
			p, _ := harness.StartPilot(t, home, "unix://"+home+"/nobody.sock", "--decryption-keys-path", keys)
			harness.Await(t, name+" "+where, func() error {
				log := harness.Read(t, home+"/pilot.log")
				if !strings.Contains(log, "pilot serves") || !strings.Contains(log, "decryption keys read") || !strings.Contains(log, s.reason) {
					return fmt.Errorf("log:\n%s", log)
				}
				return harness.Reachable(home + "/diff.sock")()
			})
			p.Stop(t)
		}
	}
}

// TestDecryptionKeysPKCS11 has the differ decrypt with a key in an HSM, which
// takes a pilot that is built with cgo.
func TestDecryptionKeysPKCS11(t *testing.T) {
	fipstest.Refused(t, fipstest.SHA1OAEP)
	dir := harness.TempDir(t)
	harness.GoBuild(t, "", dir+"/pilot", "./cmd/pilot")
	conf := harness.Write(t, dir+"/ocicrypt.conf", `{"key-providers": {}}`)
	c := harness.NewCI(t, dir+"/ci", conf)
	private, public := harness.KeyPair(t, dir+"/pair")
	hsm := harness.ImportHSMKey(t, dir+"/hsm", private)
	image := c.Image(harness.LayerKinds[1], "pkcs11:"+public)
	home := harness.TempDir(t)
	serve := func() *harness.Process {
		p := harness.Start(t, home, "pilot", exec.Command(dir+"/pilot", "serve", "--config", "/dev/null", "--listen", "unix://"+home+"/k.sock", "--broker", "unix://"+home+"/nobody.sock",
			"--diff-listen", "unix://"+home+"/diff.sock", "--containerd", home+"/containerd.sock", "--layer-record", home+"/layers", "--decryption-keys-path", home+"/keys"))
		harness.Await(t, "pilot", harness.Reachable(home+"/diff.sock"))
		return p
	}
	p := serve()
	n := harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: harness.Containerd2()})
	harness.ExpectFailure(t, n.Crictl("pull", image), "pkcs11: no private key was given")
	harness.Write(t, home+"/keys/key.yaml", harness.Read(t, hsm))
	harness.Output(t, n.Crictl("pull", image))
	harness.Output(t, n.Crictl("rmi", image))

	// A module that crashes does not take pilot along.
	p.Stop(t)
	module := harness.FaultyModule(t, dir+"/module")
	t.Setenv("OCICRYPT_CONFIG", harness.Write(t, dir+"/modules.conf", "pkcs11:\n  module-directories:\n  - "+dir+"/module\n  allowed-module-paths:\n  - "+dir+"/module/\n"))
	harness.Write(t, home+"/keys/key.yaml", strings.Replace(harness.Read(t, hsm), "module-name=softhsm2", "module-path="+module, 1))
	p = serve()
	harness.Write(t, dir+"/module/crash", "")
	harness.ExpectFailure(t, n.Crictl("pull", image), "the PKCS#11 module's process failed")
	harness.Output(t, n.Crictl("pull", image))
	harness.Output(t, n.Crictl("rmi", image))
	select {
	case <-p.Done:
		t.Error("pilot has ended")
	default:
	}

	// Nor is one loaded by two processes at once, for two layers: SoftHSM 2.6 can't do that.
	harness.Write(t, dir+"/module/alone", "")
	harness.Output(t, n.Crictl("pull", image))
	harness.Output(t, n.Crictl("rmi", image))

	// Without ocicrypt's configuration of modules none is loaded.
	p.Stop(t)
	t.Setenv("OCICRYPT_CONFIG", "")
	t.Setenv("HOME", dir)
	serve()
	harness.Await(t, "the error", func() error {
		out, err := n.Crictl("pull", image).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "set $OCICRYPT_CONFIG") {
			return fmt.Errorf("%v: %s", err, out)
		}
		return nil
	})
}

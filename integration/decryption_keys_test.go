package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// strayFiles puts a file of each kind that is no key into a directory, and says
// why it is not one. A reason is empty if there is nothing to be said.
func strayFiles(t testing.TB, dir string) map[string]struct {
	put    func(path string)
	reason string
} {
	private, public := keyPair(t, dir+"/stray")
	key := read(t, private)
	openssl := func(name string, args ...string) string {
		output(t, command(t, "openssl", append(args, "-out", dir+"/"+name)...))
		return read(t, dir+"/"+name)
	}
	password := openssl("password.pem", "pkey", "-in", private, "-aes256", "-passout", "pass:secret")
	legacy := openssl("legacy.pem", "rsa", "-in", private, "-traditional", "-aes128", "-passout", "pass:secret")
	sec1 := openssl("secp256k1.pem", "ecparam", "-name", "secp256k1", "-genkey")
	file := func(content string) func(string) { return func(path string) { write(t, path, content) } }
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
		"public.pem":    {file(read(t, public)), "a public key"},
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
				write(t, fmt.Sprintf("%s/%d", path, i), "")
			}
		}, "empty"},
	}
}

// TestDecryptionKeys has keys come and go in the directory of a node that
// decrypts with its differ or with the stream processor, with files of all kinds
// beside them.
func TestDecryptionKeys(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	conf := write(t, dir+"/ocicrypt.conf", `{"key-providers": {}}`)
	c := newCI(t, dir+"/ci", conf)
	private, public := keyPair(t, dir+"/keys")
	encrypted := c.image(kinds[1], "jwe:"+public)
	plain := encrypted + "-plain"
	output(t, c.ctrPilot("images", "push", "--plain-http", plain))
	stray := strayFiles(t, dir)

	for _, v := range []version{containerd2(), containerd17(), containerd16()} {
		t.Run(v.name, func(t *testing.T) {
			home := tempDir(t)
			keys := home + "/keys"
			differ := v.name != containerd16().name
			var n *node
			if differ {
				pilot(t, home, "unix://"+home+"/nobody.sock", "--decryption-keys-path", keys, "--admin-listen", "unix://"+home+"/admin.sock")
				n = newDifferNode(t, home, differNode{v: v})
			} else {
				n = newNode(t, home, v, conf, keys)
			}
			works := func(image string) {
				t.Helper()
				output(t, n.crictl("pull", image))
				output(t, n.crictl("rmi", image))
			}
			refused := func(want ...string) {
				t.Helper()
				works(plain)
				fails(t, n.crictl("pull", encrypted), append(want, "layer sha256:", "no key unwraps the layer key: jwe: no private key was given")...)
			}
			counted := func(usable, unusable int) {
				t.Helper()
				if !differ {
					return
				}
				metrics := profile(t, home+"/admin.sock", "/metrics")
				for state, count := range map[string]int{"usable": usable, "unusable": unusable} {
					if want := fmt.Sprintf("\npilot_decryption_keys{state=%q} %d\n", state, count); !strings.Contains(metrics, want) {
						_, rest, _ := strings.Cut(metrics, "TYPE pilot_decryption_keys")
						t.Errorf("want %q in %.300s", want, rest)
					}
				}
			}

			refused(keys + `" is missing: it does not exist`)
			counted(0, 1)
			key := write(t, keys+"/node.pem", read(t, private))
			works(encrypted)
			counted(1, 0)

			reasons := 0
			for name, s := range stray {
				path := filepath.Join(keys, name)
				s.put(path)
				if s.reason != "" {
					reasons++
				}
				if v.number < 3 {
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
			if v.number > 2 {
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
			if v.number > 2 {
				examined := newPatient(t, n).examine(t, "--decryption-keys-path", keys)
				for name, s := range stray {
					if s.reason != "" && name != "many" {
						examined.ill(t, "decryption-keys", "ls -la "+keys, filepath.Join(keys, name), s.reason, "keys that can be used: 1")
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
			write(t, key, read(t, private))
			works(encrypted)
			counted(1, 0)
			if v.number > 2 {
				for _, s := range newPatient(t, n).examine(t, "--decryption-keys-path", keys).Steps {
					if s.Name == "decryption-keys" && s.Result != "ok" {
						t.Errorf("%+v", s)
					}
				}
			}
			if differ {
				checkKeyLog(t, read(t, home+"/pilot.log"), keys, key, len(stray))
				n.noTraces(t)
			}
		})
	}
}

// checkKeyLog checks that a log names unusable files, not for each layer, and
// has no key in it.
func checkKeyLog(t testing.TB, log, keys, key string, changes int) {
	t.Helper()
	for _, secret := range append(strings.Split(read(t, key), "\n")[1:3], "pin-value", "BEGIN") {
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
	dir := tempDir(t)
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
			p, _ := pilot(t, home, "unix://"+home+"/nobody.sock", "--decryption-keys-path", keys)
			await(t, name+" "+where, func() error {
				log := read(t, home+"/pilot.log")
				if !strings.Contains(log, "pilot serves") || !strings.Contains(log, "decryption keys read") || !strings.Contains(log, s.reason) {
					return fmt.Errorf("log:\n%s", log)
				}
				return answers(home + "/diff.sock")()
			})
			p.stop(t)
		}
	}
}

// TestDecryptionKeysPKCS11 has the differ decrypt with a key in an HSM, which
// takes a pilot that is built with cgo.
func TestDecryptionKeysPKCS11(t *testing.T) {
	dir := tempDir(t)
	build := exec.Command("go", "build", "-buildvcs=false", "-o", dir+"/pilot", "./cmd/pilot")
	build.Dir, build.Env = repo, append(os.Environ(), "CGO_ENABLED=1")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", build.Args, err, out)
	}
	conf := write(t, dir+"/ocicrypt.conf", `{"key-providers": {}}`)
	c := newCI(t, dir+"/ci", conf)
	private, public := keyPair(t, dir+"/pair")
	hsm := hsmKey(t, dir+"/hsm", private)
	image := c.image(kinds[1], "pkcs11:"+public)
	home := tempDir(t)
	serve := func() *process {
		p := start(t, home, "pilot", exec.Command(dir+"/pilot", "serve", "--config", "/dev/null", "--listen", "unix://"+home+"/k.sock", "--broker", "unix://"+home+"/nobody.sock",
			"--diff-listen", "unix://"+home+"/diff.sock", "--containerd", home+"/containerd.sock", "--decryption-keys-path", home+"/keys"))
		await(t, "pilot", answers(home+"/diff.sock"))
		return p
	}
	p := serve()
	n := newDifferNode(t, home, differNode{v: containerd2()})
	fails(t, n.crictl("pull", image), "pkcs11: no private key was given")
	write(t, home+"/keys/key.yaml", read(t, hsm))
	output(t, n.crictl("pull", image))
	output(t, n.crictl("rmi", image))

	// A module that crashes does not take pilot along.
	p.stop(t)
	module := faultyModule(t, dir+"/module")
	t.Setenv("OCICRYPT_CONFIG", write(t, dir+"/modules.conf", "pkcs11:\n  module-directories:\n  - "+dir+"/module\n  allowed-module-paths:\n  - "+dir+"/module/\n"))
	write(t, home+"/keys/key.yaml", strings.Replace(read(t, hsm), "module-name=softhsm2", "module-path="+module, 1))
	p = serve()
	write(t, dir+"/module/crash", "")
	fails(t, n.crictl("pull", image), "the PKCS#11 module's process failed")
	output(t, n.crictl("pull", image))
	output(t, n.crictl("rmi", image))
	select {
	case <-p.done:
		t.Error("pilot has ended")
	default:
	}

	// Without ocicrypt's configuration of modules none is loaded.
	p.stop(t)
	t.Setenv("OCICRYPT_CONFIG", "")
	t.Setenv("HOME", dir)
	serve()
	await(t, "the error", func() error {
		out, err := n.crictl("pull", image).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "set $OCICRYPT_CONFIG") {
			return fmt.Errorf("%v: %s", err, out)
		}
		return nil
	})
}

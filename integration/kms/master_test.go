package kms

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// sealedBroker is a copilot whose master key a KMS has wrapped.
type sealedBroker struct {
	dir, config, socket string
	process             *harness.Process
}

// newSealedBroker makes one, as a new user does.
func newSealedBroker(t *testing.T, flags ...string) *sealedBroker {
	t.Helper()
	dir := harness.TempDir(t)
	_, port, _ := net.SplitHostPort(loopbacktest.FreeAddress(t))
	harness.Output(t, harness.Command(t, "copilot", append([]string{"init", "--config-dir", dir, "--dir", dir + "/store",
		"--host", "127.0.0.1", "--port", port, "--trust-domain", "example.com"}, flags...)...))
	b := &sealedBroker{dir: dir, config: dir + "/copilot.toml", socket: dir + "/copilot.sock"}
	// copilot init writes a socket's path of the package.
	harness.Write(t, b.config, strings.Replace(harness.Read(t, b.config), "/run/copilot/copilot.sock", b.socket, 1))
	return b
}

// kmsFile writes what --kms names: a backend and the master key.
func kmsFile(t *testing.T, settings, path string) string {
	t.Helper()
	return harness.Write(t, harness.TempDir(t)+"/kms.toml", fmt.Sprintf("[backends.kms]\n%s\n[master-key]\nbackend = 'kms'\npath = '%s'\n", settings, path))
}

func (b *sealedBroker) command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	return harness.Command(t, "copilot", append(args[:2:2], append([]string{"--config", b.config}, args[2:]...)...)...)
}

func (b *sealedBroker) run(t *testing.T, args ...string) string {
	t.Helper()
	return harness.Output(t, b.command(t, args...))
}

func (b *sealedBroker) start(t *testing.T) {
	t.Helper()
	b.process = harness.Start(t, b.dir, "copilot", exec.Command("copilot", "serve", "--config", b.config))
	harness.Await(t, "copilot", harness.Reachable(b.socket))
}

func (b *sealedBroker) awaitReady(t *testing.T) {
	t.Helper()
	harness.Await(t, "copilot is ready", func() error {
		if status, body := harness.RequestOverSocket(t, b.socket, "GET", "/readyz", ""); status != 204 {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
}

func (b *sealedBroker) key(t *testing.T) string {
	t.Helper()
	status, body := harness.RequestOverSocket(t, b.socket, "GET", "/api/v2/keks/team-a/key", "")
	if status != 200 {
		t.Errorf("the KEK: %d %s", status, body)
	}
	return body
}

// waits checks that it serves nothing, says why, and goes on by itself once that is over.
func (b *sealedBroker) waits(t *testing.T, why string, back func()) {
	t.Helper()
	b.start(t)
	for range 2 {
		if status, body := harness.RequestOverSocket(t, b.socket, "GET", "/readyz", ""); status != 503 || !strings.Contains(body, "the master key can't be unwrapped") {
			t.Errorf("readyz: %d %s", status, body)
		}
		if status, body := harness.RequestOverSocket(t, b.socket, "GET", "/healthz", ""); status != 204 {
			t.Errorf("healthz: %d %s", status, body)
		}
		status, body := harness.RequestOverSocket(t, b.socket, "GET", "/api/v2/keks/team-a/key", "")
		if status != 503 || !strings.Contains(body, "copilot is not ready: the master key can't be unwrapped") {
			t.Errorf("a request: %d %s", status, body)
		}
		harness.Await(t, "the log says why", func() error {
			if b.process.Logged(t, "not ready: the master key can't be unwrapped") == 0 || b.process.Logged(t, why) == 0 {
				return fmt.Errorf("%q is missing in\n%s", why, harness.Read(t, b.process.Log))
			}
			return nil
		})
		harness.ExpectFailure(t, b.command(t, "keys", "list"), why)
	}
	back()
	b.awaitReady(t)
}

// moveAway renames a file until back is called.
func moveAway(t *testing.T, name string) (back func()) {
	t.Helper()
	rename := func(from, to string) {
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	rename(name, name+".away")
	return func() { rename(name+".away", name) }
}

// TestMasterKeyInKMS has each KMS wrap the master key: of a new store, of one whose KMS is
// away when it starts, of one that is rotated, and of one that leaves it for a file.
func TestMasterKeyInKMS(t *testing.T) {
	type wrapper struct {
		settings, path string
		away           func() (back func())
		why            string
	}
	for name, make := range map[string]func(t *testing.T) wrapper{
		"OpenBao": func(t *testing.T) wrapper {
			t.Parallel()
			v := harness.NewOpenBao(t)
			v.Write("transit/keys/copilot", "{}")
			return wrapper{fmt.Sprintf("type = 'vault-transit'\naddress = %q\ntoken-file = %q\n", v.URL, v.Dir+"/root-token"), "copilot",
				func() func() { return moveAway(t, v.Dir+"/vault.sock") }, "gives no usable answer"}
		},
		"SoftHSM": func(t *testing.T) wrapper {
			k := harness.NewHSMToken(t, "copilot")
			return wrapper{"type = 'pkcs11'\n" + k.Settings(), "copilot", func() func() { return moveAway(t, k.Dir+"/tokens") }, "the KMS"}
		},
		"AWS": func(t *testing.T) wrapper {
			k := newLocalKMS(t)
			p := k.start(1)
			return wrapper{"type = 'aws-kms'\nregion = 'eu-central-1'\nendpoint = '" + k.url + "'\n", "alias/a", func() func() {
				p.Stop(t)
				return func() { p = k.start(1) }
			}, "gives no usable answer"}
		},
		"TPM": func(t *testing.T) wrapper {
			t.Parallel()
			fipstest.Refused(t, fipstest.TPM)
			p := harness.NewTPM(t)
			return wrapper{p.Settings() + "pcrs = 'sha256:7'", "machine", func() func() {
				p.Extend(t, 7, "other firmware")
				return func() {
					p.Reboot(t)
					p.Extend(t, 7, "firmware")
				}
			}, "the PCRs are not as they were"}
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := make(t)
			b := newSealedBroker(t, "--kms", kmsFile(t, w.settings, w.path))
			b.run(t, "keys", "create", "team-a")
			if _, err := os.Stat(b.dir + "/store/master.key"); err == nil {
				t.Fatal("the master key is in a file")
			}
			b.start(t)
			key := b.key(t)
			b.process.Stop(t)

			back := w.away()
			b.waits(t, w.why, back)
			if b.key(t) != key {
				t.Error("another key")
			}

			if out := b.run(t, "master", "rotate"); !strings.Contains(out, "master key 2 seals everything") {
				t.Error(out)
			}
			// The KMS is away when it is to wrap the new one.
			back = w.away()
			if status, body := harness.RequestOverSocket(t, b.dir+"/store/admin.sock", "POST", "/master/rotate", ""); status != 200 {
				t.Errorf("%d %s", status, body)
			}
			harness.Await(t, "the log says why", func() error {
				if b.process.Logged(t, "can't rotate the master key: retrying") == 0 {
					return fmt.Errorf("%s", harness.Read(t, b.process.Log))
				}
				return nil
			})
			if out := b.run(t, "master", "status"); !strings.Contains(out, "being rotated, waits for kms/"+w.path) || !strings.Contains(out, "3: seals 1 KEKs") || b.key(t) != key {
				t.Error(out)
			}
			back()
			harness.Await(t, "the rotation is done", func() error {
				if out := b.run(t, "master", "status"); strings.Contains(out, "being rotated") {
					return fmt.Errorf("%s\n%s", out, harness.Read(t, b.process.Log))
				}
				return nil
			})
			if out := b.run(t, "master", "status"); !strings.Contains(out, "3: seals 1 KEKs") || strings.Contains(out, "2: seals") || !strings.Contains(out, "held by kms/"+w.path) {
				t.Error(out)
			}
			if out := b.run(t, "audit", "verify"); !strings.Contains(out, "none changed or missing") {
				t.Error(out)
			}
			harness.ExpectFailure(t, b.command(t, "master", "move", "--to-file"), "stop it first")
			b.process.Stop(t)
			if out := b.run(t, "audit", "verify"); !strings.Contains(out, "none changed or missing") {
				t.Error(out)
			}
			b.start(t)
			if b.key(t) != key {
				t.Error("another key after a rotation")
			}
			b.process.Stop(t)

			if out := b.run(t, "master", "move", "--to-file"); !strings.Contains(out, "store/master.key, and was read back from there") || !strings.Contains(out, "remove [master-key]") {
				t.Error(out)
			}
			harness.ExpectFailure(t, b.command(t, "keys", "list"), "copilot.toml has [master-key], and "+b.dir+"/store/master.key exists", "copilot master move")
			text := harness.Read(t, b.config)
			plain, _, _ := strings.Cut(text, "[backends.kms]")
			harness.Write(t, b.config, plain)
			b.start(t)
			if b.key(t) != key {
				t.Error("another key with the master key in a file")
			}
			b.process.Stop(t)

			// And back, with a file that is not this store's first.
			harness.Write(t, b.config, text)
			file := b.dir + "/store/master.key"
			good := harness.Read(t, file)
			harness.Write(t, file, strings.Repeat("x", 32))
			harness.ExpectFailure(t, b.command(t, "master", "move"), "the master key is not the one that the KEKs are sealed with")
			if harness.Read(t, file) != strings.Repeat("x", 32) {
				t.Error("a file that is not the master key was removed")
			}
			harness.Write(t, file, good)
			out := b.run(t, "master", "move")
			if !strings.Contains(out, "the master key is in kms/"+w.path+", and was read back from there") || !strings.Contains(out, "removed "+file) {
				t.Error(out)
			}
			b.run(t, "master", "move") // once more, as after an interruption
			b.start(t)
			if b.key(t) != key {
				t.Error("another key with the master key in the KMS again")
			}
			log := harness.Read(t, b.dir+"/store/audit.log")
			for _, action := range []string{"master-rotate", "master-rotated", "master-move", "master-status"} {
				if !strings.Contains(log, `"action":"`+action+`"`) {
					t.Errorf("the audit log has no %s", action)
				}
			}
			if out := b.run(t, "audit", "verify"); !strings.Contains(out, "none changed or missing") {
				t.Error(out)
			}
		})
	}
}

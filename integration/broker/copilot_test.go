package broker

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestInitToFirstKEKOnNode does what a new user does, up to the first KEK on a node.
func TestInitToFirstKEKOnNode(t *testing.T) {
	t.Parallel()
	b := harness.NewTLSBroker(t, "team-a")
	cert, key := b.Enroll(t, "worker-7")
	if status, body := b.Request(t, cert, key, "GET", "/api/v2/keks/team-a/key", ""); status != 200 {
		t.Errorf("a node: %d %s", status, body)
	}
	if status, body := b.Request(t, cert, key, "POST", "/api/v2/keks/team-a/wrap", `{"plaintext":"AAAA"}`); status != 403 {
		t.Errorf("a node wraps: %d %s", status, body)
	}
	ciCert, ciKey := b.Enroll(t, "builder", "--role", "ci")
	if status, body := b.Request(t, ciCert, ciKey, "GET", "/api/v2/keks/team-a/key", ""); status != 409 || !strings.Contains(body, "not-exported") {
		t.Errorf("CI gets the KEK: %d %s", status, body)
	}
	if status, body := b.Request(t, ciCert, ciKey, "POST", "/api/v2/keks/team-a/wrap", `{"plaintext":"AAAA"}`); status != 200 {
		t.Errorf("CI wraps: %d %s", status, body)
	}

	// The admin works from another machine.
	remote := func(cert, key, verb string, args ...string) *exec.Cmd {
		return harness.Command(t, "copilot", append([]string{"keys", verb, "--config", "/dev/null", "--server", b.URL(), "--ca", b.Dir + "/ca.pem", "--cert", cert, "--key", key}, args...)...)
	}
	admin := []string{b.Dir + "/admin.pem", b.Dir + "/admin-key.pem"}
	harness.Output(t, remote(admin[0], admin[1], "create", "team-b"))
	if out := harness.Output(t, remote(admin[0], admin[1], "rotate", "team-b")); out != "team-b rotated, current version 2\n" {
		t.Error(out)
	}
	harness.ExpectFailure(t, remote(cert, key, "rotate", "team-b"), "spiffe://example.com/node/worker-7 may not, or there is no such KEK")
	harness.ExpectFailure(t, remote(admin[0], admin[1], "show", "nobody"), "no such KEK")
	harness.Output(t, remote(admin[0], admin[1], "revoke", "--identity", "spiffe://example.com/node/worker-7", "team-a"))
	if status, body := b.Request(t, cert, key, "GET", "/api/v2/keks/team-a/key", ""); status != 403 {
		t.Errorf("a revoked node: %d %s", status, body)
	}
	harness.ExpectFailure(t, b.Command(t, "policy", "check", "spiffe://example.com/node/worker-7", "team-a", "unwrap"), "but the KEK was revoked for")

	// The node makes its own key, with a common tool.
	harness.Output(t, harness.Command(t, "openssl", "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=evil",
		"-addext", "subjectAltName=URI:spiffe://example.com/admin", "-keyout", b.Dir+"/csr-key.pem", "-out", b.Dir+"/csr.pem"))
	harness.Output(t, harness.Command(t, "copilot", "enroll", "--config-dir", b.Dir, "--out", b.Dir, "--csr", b.Dir+"/csr.pem", "worker-8"))
	if status, body := b.Request(t, b.Dir+"/worker-8.pem", b.Dir+"/csr-key.pem", "GET", "/api/v2/keks/team-a/key", ""); status != 200 {
		t.Errorf("a node with a key of its own: %d %s", status, body)
	}
	if !strings.Contains(harness.Read(t, b.Dir+"/store/audit.log"), `"who":"spiffe://example.com/node/worker-8"`) {
		t.Error("what the request said of itself counts")
	}

	// A certificate that holds no more.
	shortCert, shortKey := b.Enroll(t, "short", "--for", "20s")
	if status, body := b.Request(t, shortCert, shortKey, "GET", "/api/v2/keks/team-a/key", ""); status != 200 {
		t.Errorf("a short certificate: %d %s", status, body)
	}
	harness.Await(t, "an expired certificate", func() error {
		if status, body := b.Request(t, shortCert, shortKey, "GET", "/api/v2/keks/team-a/key", ""); status != 0 || !strings.Contains(body, "certificate") {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})

	// The audit log is rotated, and continues.
	log := b.Dir + "/store/audit.log"
	if err := os.Rename(log, log+".1"); err != nil {
		t.Fatal(err)
	}
	b.Process.Cmd.Process.Signal(syscall.SIGHUP)
	harness.Await(t, "a new audit log", func() error { _, err := os.Stat(log); return err })
	b.Request(t, ciCert, ciKey, "GET", "/api/v2/keks/team-a/key", "")
	head := strings.Fields(harness.Output(t, b.Command(t, "audit", "verify", log+".1")))
	harness.ExpectFailure(t, b.Command(t, "audit", "verify", log), "the lines before it are missing")
	harness.Output(t, b.Command(t, "audit", "verify")) // takes the other one along
	harness.Output(t, b.Command(t, "audit", "verify", "--since", head[len(head)-1]))
	harness.Output(t, b.Command(t, "audit", "verify", log+".1", log))
}

// TestFullDiskOfBrokerFailsCleanly fills the disk under the store and the audit log.
func TestFullDiskOfBrokerFailsCleanly(t *testing.T) {
	t.Parallel()
	for name, auditElsewhere := range map[string]bool{"the store": true, "the store and the audit log": false} {
		t.Run(name, func(t *testing.T) {
			dir := harness.TempDir(t)
			store, socket := dir+"/disk", dir+"/copilot.sock"
			if err := os.Mkdir(store, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := syscall.Mount("tmpfs", store, "tmpfs", 0, "size=1m,mode=0755"); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { syscall.Unmount(store, syscall.MNT_DETACH) })
			copilot := func(args ...string) *exec.Cmd {
				args = append(args[:2:2], append([]string{"--dir", store}, args[2:]...)...)
				if auditElsewhere {
					args = append(args[:2:2], append([]string{"--audit-log", dir + "/audit.log"}, args[2:]...)...)
				}
				return harness.Command(t, "copilot", args...)
			}
			harness.Output(t, copilot("keys", "create", "team-a"))
			serve := []string{"serve", "--dir", store, "--listen", "unix://" + socket}
			if auditElsewhere {
				serve = append(serve, "--audit-log", dir+"/audit.log")
			}
			p := harness.Start(t, dir, "copilot", exec.Command("copilot", serve...))
			harness.Await(t, "copilot", harness.Reachable(socket))
			_, wrapped := harness.RequestOverSocket(t, socket, "POST", "/api/v2/keks/team-a/wrap", `{"plaintext":"AAAA"}`)
			harness.FillDisk(t, store+"/filler")
			failed, rotated := 0, 0
			for failed < 3 && rotated < 300 { // bbolt has free pages at first
				if copilot("keys", "rotate", "team-a").Run() != nil {
					failed++
				} else {
					rotated++
				}
			}
			if failed != 3 {
				t.Fatal("a full disk takes everything")
			}
			harness.ExpectFailure(t, copilot("keys", "rotate", "team-a"), "see copilot's log for request")
			if log := harness.Read(t, p.Log); !strings.Contains(log, "no space left on device") {
				t.Errorf("the log does not say why:\n%s", log)
			}
			if err := os.Remove(store + "/filler"); err != nil {
				t.Fatal(err)
			}
			// A failed change has changed nothing, and the next one works.
			if out := harness.Output(t, copilot("keys", "rotate", "team-a")); out != fmt.Sprintf("team-a rotated, current version %d\n", rotated+2) {
				t.Error(out)
			}
			unwrap := strings.Replace(wrapped, `"id":"team-a",`, "", 1)
			if status, answer := harness.RequestOverSocket(t, socket, "POST", "/api/v2/keks/team-a/unwrap", unwrap); status != 200 || answer != `{"plaintext":"AAAA"}` {
				t.Errorf("what was wrapped before: %d %s", status, answer)
			}
			p.Kill()
			harness.Output(t, copilot("keys", "show", "team-a"))
			harness.Output(t, copilot("audit", "verify"))
		})
	}
}

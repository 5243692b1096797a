package integration

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// ask makes a request to a broker's unix socket.
func ask(t testing.TB, socket, method, path, body string) (int, string) {
	t.Helper()
	return askWith(t, &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}, "http://copilot", method, path, body)
}

func askWith(t testing.TB, transport *http.Transport, base, method, path, body string) (int, string) {
	t.Helper()
	transport.DisableKeepAlives = true
	client := http.Client{Timeout: patience, Transport: transport}
	req, err := http.NewRequest(method, base+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// madeBroker is a broker that "copilot init" configured.
type madeBroker struct {
	dir, address string
	process      *process
}

// initialized makes a broker as a new user does, with KEKs, and starts it.
func initialized(t testing.TB, keks ...string) *madeBroker {
	t.Helper()
	b := &madeBroker{dir: tempDir(t), address: loopbacktest.FreeAddress(t)}
	_, port, _ := net.SplitHostPort(b.address)
	output(t, command(t, "copilot", "init", "--config-dir", b.dir, "--dir", b.dir+"/store", "--host", "127.0.0.1", "--port", port, "--trust-domain", "example.com"))
	for _, kek := range keks {
		output(t, b.command(t, "keys", "create", kek))
	}
	b.start(t)
	return b
}

func (b *madeBroker) start(t testing.TB) {
	t.Helper()
	b.process = start(t, b.dir, "copilot", exec.Command("copilot", "serve", "--config", b.dir+"/copilot.toml",
		"--listen", b.address, "--listen", "unix://"+b.dir+"/copilot.sock"))
	await(t, "copilot", answers(b.dir+"/copilot.sock"))
}

// command returns copilot's command verb, with the broker's configuration. The
// arguments follow the flags.
func (b *madeBroker) command(t testing.TB, verb, subverb string, args ...string) *exec.Cmd {
	t.Helper()
	return command(t, "copilot", append([]string{verb, subverb, "--config", b.dir + "/copilot.toml"}, args...)...)
}

func (b *madeBroker) url() string { return "https://" + b.address }

// enroll makes a certificate, and returns its files.
func (b *madeBroker) enroll(t testing.TB, name string, args ...string) (cert, key string) {
	t.Helper()
	output(t, command(t, "copilot", append(append([]string{"enroll", "--config-dir", b.dir, "--out", b.dir}, args...), name)...))
	return b.dir + "/" + name + ".pem", b.dir + "/" + name + "-key.pem"
}

// as makes a request as the holder of a certificate.
func (b *madeBroker) as(t testing.TB, cert, key, method, path, body string) (int, string) {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	pool, err := certfile.Pool(b.dir + "/ca.pem")
	if err != nil {
		t.Fatal(err)
	}
	return askWith(t, &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{pair}}}, b.url(), method, path, body)
}

// TestInit does what a new user does, up to the first KEK on a node.
func TestInit(t *testing.T) {
	t.Parallel()
	b := initialized(t, "team-a")
	cert, key := b.enroll(t, "worker-7")
	if status, body := b.as(t, cert, key, "GET", "/api/v2/keks/team-a/key", ""); status != 200 {
		t.Errorf("a node: %d %s", status, body)
	}
	if status, body := b.as(t, cert, key, "POST", "/api/v2/keks/team-a/wrap", `{"plaintext":"AAAA"}`); status != 403 {
		t.Errorf("a node wraps: %d %s", status, body)
	}
	ciCert, ciKey := b.enroll(t, "builder", "--role", "ci")
	if status, body := b.as(t, ciCert, ciKey, "GET", "/api/v2/keks/team-a/key", ""); status != 409 || !strings.Contains(body, "not-exported") {
		t.Errorf("CI gets the KEK: %d %s", status, body)
	}
	if status, body := b.as(t, ciCert, ciKey, "POST", "/api/v2/keks/team-a/wrap", `{"plaintext":"AAAA"}`); status != 200 {
		t.Errorf("CI wraps: %d %s", status, body)
	}

	// The admin works from elsewhere.
	remote := func(cert, key, verb string, args ...string) *exec.Cmd {
		return command(t, "copilot", append([]string{"keys", verb, "--config", "/dev/null", "--server", b.url(), "--ca", b.dir + "/ca.pem", "--cert", cert, "--key", key}, args...)...)
	}
	admin := []string{b.dir + "/admin.pem", b.dir + "/admin-key.pem"}
	output(t, remote(admin[0], admin[1], "create", "team-b"))
	if out := output(t, remote(admin[0], admin[1], "rotate", "team-b")); out != "team-b rotated, current version 2\n" {
		t.Error(out)
	}
	fails(t, remote(cert, key, "rotate", "team-b"), "spiffe://example.com/node/worker-7 may not, or there is no such KEK")
	fails(t, remote(admin[0], admin[1], "show", "nobody"), "no such KEK")
	output(t, remote(admin[0], admin[1], "revoke", "--identity", "spiffe://example.com/node/worker-7", "team-a"))
	if status, body := b.as(t, cert, key, "GET", "/api/v2/keks/team-a/key", ""); status != 403 {
		t.Errorf("a revoked node: %d %s", status, body)
	}
	fails(t, b.command(t, "policy", "check", "spiffe://example.com/node/worker-7", "team-a", "unwrap"), "but the KEK was revoked for")

	// The node makes its own key, with a common tool.
	output(t, command(t, "openssl", "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=evil",
		"-addext", "subjectAltName=URI:spiffe://example.com/admin", "-keyout", b.dir+"/csr-key.pem", "-out", b.dir+"/csr.pem"))
	output(t, command(t, "copilot", "enroll", "--config-dir", b.dir, "--out", b.dir, "--csr", b.dir+"/csr.pem", "worker-8"))
	if status, body := b.as(t, b.dir+"/worker-8.pem", b.dir+"/csr-key.pem", "GET", "/api/v2/keks/team-a/key", ""); status != 200 {
		t.Errorf("a node with a key of its own: %d %s", status, body)
	}
	if !strings.Contains(read(t, b.dir+"/store/audit.log"), `"who":"spiffe://example.com/node/worker-8"`) {
		t.Error("what the request said of itself counts")
	}

	// A certificate that holds no more.
	shortCert, shortKey := b.enroll(t, "short", "--for", "20s")
	if status, body := b.as(t, shortCert, shortKey, "GET", "/api/v2/keks/team-a/key", ""); status != 200 {
		t.Errorf("a short certificate: %d %s", status, body)
	}
	await(t, "an expired certificate", func() error {
		if status, body := b.as(t, shortCert, shortKey, "GET", "/api/v2/keks/team-a/key", ""); status != 0 || !strings.Contains(body, "certificate") {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})

	// The audit log is put away, and goes on.
	log := b.dir + "/store/audit.log"
	if err := os.Rename(log, log+".1"); err != nil {
		t.Fatal(err)
	}
	b.process.cmd.Process.Signal(syscall.SIGHUP)
	await(t, "a new audit log", func() error { _, err := os.Stat(log); return err })
	b.as(t, ciCert, ciKey, "GET", "/api/v2/keks/team-a/key", "")
	head := strings.Fields(output(t, b.command(t, "audit", "verify", log+".1")))
	fails(t, b.command(t, "audit", "verify", log), "the lines before it are missing")
	output(t, b.command(t, "audit", "verify")) // takes the other one along
	output(t, b.command(t, "audit", "verify", "--since", head[len(head)-1]))
	output(t, b.command(t, "audit", "verify", log+".1", log))
}

// TestFullDisk fills the disk under the store and the audit log.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	for name, auditElsewhere := range map[string]bool{"the store": true, "the store and the audit log": false} {
		t.Run(name, func(t *testing.T) {
			dir := tempDir(t)
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
				return command(t, "copilot", args...)
			}
			output(t, copilot("keys", "create", "team-a"))
			serve := []string{"serve", "--dir", store, "--listen", "unix://" + socket}
			if auditElsewhere {
				serve = append(serve, "--audit-log", dir+"/audit.log")
			}
			p := start(t, dir, "copilot", exec.Command("copilot", serve...))
			await(t, "copilot", answers(socket))
			_, wrapped := ask(t, socket, "POST", "/api/v2/keks/team-a/wrap", `{"plaintext":"AAAA"}`)
			fill(t, store+"/filler")
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
			fails(t, copilot("keys", "rotate", "team-a"), "see copilot's log for request")
			if log := read(t, p.log); !strings.Contains(log, "no space left on device") {
				t.Errorf("the log does not say why:\n%s", log)
			}
			if err := os.Remove(store + "/filler"); err != nil {
				t.Fatal(err)
			}
			// What failed changed nothing, and the next works.
			if out := output(t, copilot("keys", "rotate", "team-a")); out != fmt.Sprintf("team-a rotated, current version %d\n", rotated+2) {
				t.Error(out)
			}
			unwrap := strings.Replace(wrapped, `"id":"team-a",`, "", 1)
			if status, answer := ask(t, socket, "POST", "/api/v2/keks/team-a/unwrap", unwrap); status != 200 || answer != `{"plaintext":"AAAA"}` {
				t.Errorf("what was wrapped before: %d %s", status, answer)
			}
			p.kill()
			output(t, copilot("keys", "show", "team-a"))
			output(t, copilot("audit", "verify"))
		})
	}
}

// fill writes until the disk is full.
func fill(t *testing.T, name string) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 64 << 10; size > 0; size /= 2 {
		for b := make([]byte, size); ; {
			if _, err := f.Write(b); err != nil {
				break
			}
		}
	}
}

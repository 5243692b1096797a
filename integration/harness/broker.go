package harness

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// RequestOverSocket makes a request to a broker's unix socket.
func RequestOverSocket(t testing.TB, socket, method, path, body string) (int, string) {
	t.Helper()
	return request(t, &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}, "http://copilot", method, path, body)
}

func request(t testing.TB, transport *http.Transport, base, method, path, body string) (int, string) {
	t.Helper()
	transport.DisableKeepAlives = true
	client := http.Client{Timeout: Timeout, Transport: transport}
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

// TLSBroker is a broker that "copilot init" configured.
type TLSBroker struct {
	Dir, Address string
	Process      *Process
}

// NewTLSBroker makes a broker as a new user does, with KEKs, and starts it.
func NewTLSBroker(t testing.TB, keks ...string) *TLSBroker {
	t.Helper()
	b := &TLSBroker{Dir: TempDir(t), Address: loopbacktest.FreeAddress(t)}
	_, port, _ := net.SplitHostPort(b.Address)
	Output(t, Command(t, "copilot", "init", "--config-dir", b.Dir, "--dir", b.Dir+"/store", "--host", "127.0.0.1", "--port", port, "--trust-domain", "example.com"))
	for _, kek := range keks {
		Output(t, b.Command(t, "keys", "create", kek))
	}
	b.Start(t)
	return b
}

func (b *TLSBroker) Start(t testing.TB) {
	t.Helper()
	b.Process = Start(t, b.Dir, "copilot", exec.Command("copilot", "serve", "--config", b.Dir+"/copilot.toml",
		"--listen", b.Address, "--listen", "unix://"+b.Dir+"/copilot.sock"))
	Await(t, "copilot", Reachable(b.Dir+"/copilot.sock"))
}

// SetPolicy replaces the policy, and returns when it counts.
func (b *TLSBroker) SetPolicy(t testing.TB, text string) {
	t.Helper()
	reloads := b.Process.Logged(t, "policy reloaded")
	if err := os.Rename(Write(t, b.Dir+"/policy.new", text), b.Dir+"/policy.toml"); err != nil {
		t.Fatal(err)
	}
	b.Process.Cmd.Process.Signal(syscall.SIGHUP)
	Await(t, "the policy", func() error {
		if b.Process.Logged(t, "policy reloaded") == reloads {
			return errors.New("copilot has not read it")
		}
		return nil
	})
}

// AddRules adds rules to the policy, and returns when they count.
func (b *TLSBroker) AddRules(t testing.TB, rules string) {
	t.Helper()
	b.SetPolicy(t, Read(t, b.Dir+"/policy.toml")+"\n"+rules)
}

// Command returns copilot's command verb, with the broker's configuration. The
// arguments follow the flags.
func (b *TLSBroker) Command(t testing.TB, verb, subverb string, args ...string) *exec.Cmd {
	t.Helper()
	return Command(t, "copilot", append([]string{verb, subverb, "--config", b.Dir + "/copilot.toml"}, args...)...)
}

func (b *TLSBroker) URL() string { return "https://" + b.Address }

// Enroll makes a certificate, and returns its files.
func (b *TLSBroker) Enroll(t testing.TB, name string, args ...string) (cert, key string) {
	t.Helper()
	Output(t, Command(t, "copilot", append(append([]string{"enroll", "--config-dir", b.Dir, "--out", b.Dir}, args...), name)...))
	return b.Dir + "/" + name + ".pem", b.Dir + "/" + name + "-key.pem"
}

// ClientTLS returns the TLS of a client with a certificate.
func (b *TLSBroker) ClientTLS(t testing.TB, cert, key string) *tls.Config {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	pool, err := certfile.Pool(b.Dir + "/ca.pem")
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{pair}}
}

// Request makes a request as the holder of a certificate.
func (b *TLSBroker) Request(t testing.TB, cert, key, method, path, body string) (int, string) {
	t.Helper()
	return request(t, &http.Transport{TLSClientConfig: b.ClientTLS(t, cert, key)}, b.URL(), method, path, body)
}

// StartBroker starts a copilot in dir with the KEKs given and returns its socket's
// address. KEKs of one name are the same key in all brokers.
func StartBroker(t testing.TB, dir string, keks ...string) (*Process, string) {
	t.Helper()
	socket := filepath.Join(dir, "copilot.sock")
	for _, kek := range keks {
		key := sha256.Sum256([]byte(kek))
		file := Write(t, filepath.Join(dir, "key"), string(key[:]))
		Output(t, Command(t, "copilot", "keys", "import", "--dir", dir, "--file", file, kek))
	}
	p := Start(t, dir, "copilot", exec.Command("copilot", "serve", "--dir", dir, "--listen", "unix://"+socket))
	Await(t, "copilot", Reachable(socket))
	return p, "unix://" + socket
}

// RotateKEK gives a KEK of the broker in dir a new version.
func RotateKEK(t testing.TB, dir, kek string) {
	t.Helper()
	Output(t, Command(t, "copilot", "keys", "rotate", "--dir", dir, kek))
}

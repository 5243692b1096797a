package faults

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

// vethPair is a network of two machines, each a network namespace. Only what is run
// at one of its ends sees it.
type vethPair struct {
	t    testing.TB
	ends [2]string // the names of the namespaces, and of their interfaces
}

// vethAddresses are those of a cable's ends.
var vethAddresses = [2]string{"10.99.0.1", "10.99.0.2"}

func newVethPair(t testing.TB, dir string) *vethPair {
	t.Helper()
	name := strings.TrimPrefix(filepath.Base(dir), "pilot-it-")
	c := &vethPair{t, [2]string{"pa" + name, "pb" + name}}
	for _, end := range c.ends {
		harness.Output(t, harness.Command(t, "ip", "netns", "add", end))
		t.Cleanup(func() {
			if out, err := exec.Command("ip", "netns", "delete", end).CombinedOutput(); err != nil {
				t.Errorf("ip netns delete %s: %v: %s", end, err, out)
			}
		})
	}
	harness.Output(t, harness.Command(t, "ip", "-n", c.ends[0], "link", "add", c.ends[0], "type", "veth", "peer", "name", c.ends[1], "netns", c.ends[1]))
	for i, end := range c.ends {
		harness.Output(t, harness.Command(t, "ip", "-n", end, "address", "add", vethAddresses[i]+"/24", "dev", end))
		harness.Output(t, harness.Command(t, "ip", "-n", end, "link", "set", end, "up"))
	}
	return c
}

// set cuts the cable at its first end, "down", or connects it again, "up". What the
// other end sends meanwhile is lost, and it does not notice.
func (c *vethPair) set(state string) {
	c.t.Helper()
	harness.Output(c.t, harness.Command(c.t, "ip", "-n", c.ends[0], "link", "set", c.ends[0], state))
}

// command returns a command that runs at an end.
func (c *vethPair) command(end int, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--net=/run/netns/" + c.ends[end], "--"}, args...)...)
}

// TCP sends again after 0.2 seconds, and then after twice the time each time. After
// 14 seconds of that it is silent for 11 more: what works again before then does
// so over a new connection.
const cutLasts, silentFor = 14 * time.Second, 11 * time.Second

// TestNetworkCutToBroker cuts the network between pilot and copilot, while requests are
// under way and between them.
func TestNetworkCutToBroker(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	dir := harness.TempDir(t)
	c := newVethPair(t, dir)
	b := &harness.TLSBroker{Dir: dir + "/broker", Address: vethAddresses[0] + ":8443"}
	harness.Output(t, harness.Command(t, "copilot", "init", "--config-dir", b.Dir, "--dir", b.Dir+"/store", "--host", vethAddresses[0], "--port", "8443", "--trust-domain", "example.com"))
	harness.Output(t, b.Command(t, "keys", "create", "team-a"))
	harness.Start(t, b.Dir, "copilot", c.command(0, "copilot", "serve", "--config", b.Dir+"/copilot.toml", "--listen", b.Address, "--listen", "unix://"+b.Dir+"/copilot.sock"))
	harness.Await(t, "copilot", harness.Reachable(b.Dir+"/copilot.sock"))

	cert, key := b.Enroll(t, "worker-7")
	const timeout = 4 * time.Second
	pilotAt := func(name string, args ...string) *harness.PilotClient {
		home := dir + "/" + name
		args = append([]string{"pilot", "serve", "--config", "/dev/null", "--listen", "unix://" + home + "/keyprovider.sock", "--diff-listen", "off",
			"--admin-listen", "unix://" + home + "/admin.sock", "--broker", b.URL(), "--broker-ca", b.Dir + "/ca.pem", "--broker-cert", cert, "--broker-key", key,
			"--broker-timeout", timeout.String()}, args...)
		harness.Start(t, home, "pilot", c.command(1, args...))
		harness.Await(t, "pilot", harness.Reachable(home+"/keyprovider.sock"))
		return harness.NewPilotClient(t, home)
	}
	// One asks for each layer key. The other has its KEK in memory, longer than
	// it may unless the broker is away.
	without, cached := pilotAt("without", "--kek-cache-size", "0"), pilotAt("cached", "--kek-cache-ttl", "1s", "--kek-cache-grace", "1h")
	annotation, err := without.Wrap(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := cached.Unwrap(t.Context(), annotation); err != nil {
		t.Fatal(err)
	}
	goroutines, files := without.Metric(t, "go_goroutines"), without.Metric(t, "process_open_fds")

	inTime := func(what string) {
		t.Helper()
		start := time.Now()
		err := without.Unwrap(t.Context(), annotation)
		if took := time.Since(start); took > timeout+harness.Timeout/4 {
			t.Errorf("%s: the error took %s", what, took)
		}
		if err == nil || !strings.Contains(err.Error(), `KEK "team-a"`) || !strings.Contains(err.Error(), "copilot at "+b.URL()) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, cut := range []struct {
		name string
		busy int // requests that are under way all the time
	}{{"one request", 1}, {"many requests", 8}} {
		t.Run(cut.name, func(t *testing.T) {
			stop := make(chan struct{})
			var load sync.WaitGroup
			for range cut.busy {
				load.Go(func() {
					for {
						select {
						case <-stop:
							return
						default:
						}
						start := time.Now()
						without.Unwrap(t.Context(), annotation)
						time.Sleep(20 * time.Millisecond) // how it failed is remembered
						if took := time.Since(start); took > timeout+harness.Timeout/4 {
							t.Errorf("a request under way took %s", took)
						}
					}
				})
			}
			time.Sleep(100 * time.Millisecond)
			c.set("down")
			began := time.Now()
			for end := began.Add(cutLasts - timeout - time.Second); time.Now().Before(end); {
				inTime("cut")
				time.Sleep(20 * time.Millisecond)
				start := time.Now()
				if err := cached.Unwrap(t.Context(), annotation); err != nil {
					t.Errorf("with a KEK in memory: %v", err)
				}
				if took := time.Since(start); took > timeout+harness.Timeout/4 {
					t.Errorf("with a KEK in memory: it took %s", took)
				}
			}
			time.Sleep(time.Until(began.Add(cutLasts)))
			c.set("up")
			up := time.Now()
			harness.Await(t, "the next", func() error { return without.Unwrap(t.Context(), annotation) })
			t.Logf("it worked again %s after the network did", time.Since(up))
			if took := time.Since(began); took > cutLasts+silentFor {
				t.Errorf("it worked again %s after the cut", took)
			}
			close(stop)
			load.Wait()
			if err := without.Unwrap(t.Context(), annotation); err != nil {
				t.Error(err)
			}
		})
	}
	without.CheckLeaks(t, "go_goroutines", goroutines)
	without.CheckLeaks(t, "process_open_fds", files)
}

// TestNetworkCutToVault cuts the network between copilot and a KMS.
func TestNetworkCutToVault(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := newVethPair(t, dir)
	v := harness.NewVault(t)
	v.Put("team-a")
	v.Process.Stop(t)
	b := &harness.TLSBroker{Dir: dir + "/broker"}
	harness.Output(t, harness.Command(t, "copilot", "init", "--config-dir", b.Dir, "--dir", b.Dir+"/store", "--host", vethAddresses[1], "--trust-domain", "example.com"))
	cert, key := b.Enroll(t, "vault", "--host", vethAddresses[0])
	address := vethAddresses[0] + ":8200"
	harness.Start(t, v.Dir, "vault-dev", c.command(0, "vault-dev", "-dir", v.Dir, "-listen", address, "-tls-cert", cert, "-tls-key", key))
	socket := dir + "/copilot.sock"
	conf := harness.Write(t, dir+"/copilot.toml", fmt.Sprintf(`
dir = %q
listen = [%q]
[backends.kv]
type = "vault-kv"
address = %q
ca = %q
token-file = %q
[keks."team-a"]
backend = "kv"
path = "secret/data/team-a"
`, dir+"/store", "unix://"+socket, "https://"+address, b.Dir+"/ca.pem", v.Dir+"/root-token"))
	harness.Start(t, dir, "copilot", c.command(1, "copilot", "serve", "--config", conf))
	harness.Await(t, "copilot", harness.Reachable(socket))
	export := func() error {
		if status, answer := harness.RequestOverSocket(t, socket, "GET", "/api/v2/keks/team-a/key", ""); status != 200 {
			return fmt.Errorf("%d %s", status, answer)
		}
		return nil
	}
	harness.Await(t, "Vault", export)

	c.set("down")
	began := time.Now()
	if err := export(); err == nil || !strings.Contains(err.Error(), "503") {
		t.Errorf("without a network: %v", err)
	}
	if took := time.Since(began); took > harness.Timeout {
		t.Errorf("without a network: the error took %s", took)
	}
	time.Sleep(time.Until(began.Add(cutLasts)))
	c.set("up")
	harness.Await(t, "the next", export)
	if took := time.Since(began); took > cutLasts+silentFor {
		t.Errorf("it worked again %s after the cut", took)
	}
}

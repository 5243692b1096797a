package integration

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// cable is a network of two machines, each a network namespace. Only what is run
// at one of its ends sees it.
type cable struct {
	t    testing.TB
	ends [2]string // the names of the namespaces, and of their interfaces
}

// cableAddresses are those of a cable's ends.
var cableAddresses = [2]string{"10.99.0.1", "10.99.0.2"}

func newCable(t testing.TB, dir string) *cable {
	t.Helper()
	name := strings.TrimPrefix(filepath.Base(dir), "pilot-it-")
	c := &cable{t, [2]string{"pa" + name, "pb" + name}}
	for _, end := range c.ends {
		output(t, command(t, "ip", "netns", "add", end))
		t.Cleanup(func() {
			if out, err := exec.Command("ip", "netns", "delete", end).CombinedOutput(); err != nil {
				t.Errorf("ip netns delete %s: %v: %s", end, err, out)
			}
		})
	}
	output(t, command(t, "ip", "-n", c.ends[0], "link", "add", c.ends[0], "type", "veth", "peer", "name", c.ends[1], "netns", c.ends[1]))
	for i, end := range c.ends {
		output(t, command(t, "ip", "-n", end, "address", "add", cableAddresses[i]+"/24", "dev", end))
		output(t, command(t, "ip", "-n", end, "link", "set", end, "up"))
	}
	return c
}

// set cuts the cable at its first end, "down", or mends it, "up". What the
// other end sends meanwhile is lost, and nobody tells it.
func (c *cable) set(state string) {
	c.t.Helper()
	output(c.t, command(c.t, "ip", "-n", c.ends[0], "link", "set", c.ends[0], state))
}

// at returns a command that runs at an end.
func (c *cable) at(end int, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--net=/run/netns/" + c.ends[end], "--"}, args...)...)
}

// TCP sends again after 0.2 seconds, and then after twice the time each time. After
// 14 seconds of that it is silent for 11 more: what works again before then does
// so over a new connection.
const cutLasts, silentFor = 14 * time.Second, 11 * time.Second

// TestNetworkCut cuts the network between pilot and copilot, while requests are
// under way and between them.
func TestNetworkCut(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	c := newCable(t, dir)
	b := &madeBroker{dir: dir + "/broker", address: cableAddresses[0] + ":8443"}
	output(t, command(t, "copilot", "init", "--config-dir", b.dir, "--dir", b.dir+"/store", "--host", cableAddresses[0], "--port", "8443", "--trust-domain", "example.com"))
	output(t, b.command(t, "keys", "create", "team-a"))
	start(t, b.dir, "copilot", c.at(0, "copilot", "serve", "--config", b.dir+"/copilot.toml", "--listen", b.address, "--listen", "unix://"+b.dir+"/copilot.sock"))
	await(t, "copilot", answers(b.dir+"/copilot.sock"))

	cert, key := b.enroll(t, "worker-7")
	const timeout = 4 * time.Second
	pilotAt := func(name string, args ...string) *keys {
		home := dir + "/" + name
		args = append([]string{"pilot", "serve", "--config", "/dev/null", "--listen", "unix://" + home + "/keyprovider.sock", "--diff-listen", "off",
			"--admin-listen", "unix://" + home + "/admin.sock", "--broker", b.url(), "--broker-ca", b.dir + "/ca.pem", "--broker-cert", cert, "--broker-key", key,
			"--broker-timeout", timeout.String()}, args...)
		start(t, home, "pilot", c.at(1, args...))
		await(t, "pilot", answers(home+"/keyprovider.sock"))
		return askPilot(t, home)
	}
	// One asks for each layer key. The other has its KEK in memory, longer than
	// it may unless the broker is away.
	without, cached := pilotAt("without", "--kek-cache-size", "0"), pilotAt("cached", "--kek-cache-ttl", "1s", "--kek-cache-grace", "1h")
	annotation, err := without.wrap(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := cached.unwrap(t.Context(), annotation); err != nil {
		t.Fatal(err)
	}
	goroutines, files := without.metric(t, "go_goroutines"), without.metric(t, "process_open_fds")

	inTime := func(what string) {
		t.Helper()
		start := time.Now()
		err := without.unwrap(t.Context(), annotation)
		if took := time.Since(start); took > timeout+patience/4 {
			t.Errorf("%s: the error took %s", what, took)
		}
		if err == nil || !strings.Contains(err.Error(), `KEK "team-a"`) || !strings.Contains(err.Error(), "copilot at "+b.url()) {
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
						without.unwrap(t.Context(), annotation)
						time.Sleep(20 * time.Millisecond) // how it failed is remembered
						if took := time.Since(start); took > timeout+patience/4 {
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
				if err := cached.unwrap(t.Context(), annotation); err != nil {
					t.Errorf("with a KEK in memory: %v", err)
				}
				if took := time.Since(start); took > timeout+patience/4 {
					t.Errorf("with a KEK in memory: it took %s", took)
				}
			}
			time.Sleep(time.Until(began.Add(cutLasts)))
			c.set("up")
			up := time.Now()
			await(t, "the next", func() error { return without.unwrap(t.Context(), annotation) })
			t.Logf("it worked again %s after the network did", time.Since(up))
			if took := time.Since(began); took > cutLasts+silentFor {
				t.Errorf("it worked again %s after the cut", took)
			}
			close(stop)
			load.Wait()
			if err := without.unwrap(t.Context(), annotation); err != nil {
				t.Error(err)
			}
		})
	}
	without.flat(t, "go_goroutines", goroutines)
	without.flat(t, "process_open_fds", files)
}

// TestNetworkCutToVault cuts the network between copilot and a KMS.
func TestNetworkCutToVault(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	c := newCable(t, dir)
	v := newVault(t)
	v.put("team-a")
	v.process.stop(t)
	b := &madeBroker{dir: dir + "/broker"}
	output(t, command(t, "copilot", "init", "--config-dir", b.dir, "--dir", b.dir+"/store", "--host", cableAddresses[1], "--trust-domain", "example.com"))
	cert, key := b.enroll(t, "vault", "--host", cableAddresses[0])
	address := cableAddresses[0] + ":8200"
	start(t, v.dir, "vault-dev", c.at(0, "vault-dev", "-dir", v.dir, "-listen", address, "-tls-cert", cert, "-tls-key", key))
	socket := dir + "/copilot.sock"
	conf := write(t, dir+"/copilot.toml", fmt.Sprintf(`
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
`, dir+"/store", "unix://"+socket, "https://"+address, b.dir+"/ca.pem", v.dir+"/root-token"))
	start(t, dir, "copilot", c.at(1, "copilot", "serve", "--config", conf))
	await(t, "copilot", answers(socket))
	export := func() error {
		if status, answer := ask(t, socket, "GET", "/api/v2/keks/team-a/key", ""); status != 200 {
			return fmt.Errorf("%d %s", status, answer)
		}
		return nil
	}
	await(t, "Vault", export)

	c.set("down")
	began := time.Now()
	if err := export(); err == nil || !strings.Contains(err.Error(), "503") {
		t.Errorf("without a network: %v", err)
	}
	if took := time.Since(began); took > patience {
		t.Errorf("without a network: the error took %s", took)
	}
	time.Sleep(time.Until(began.Add(cutLasts)))
	c.set("up")
	await(t, "the next", export)
	if took := time.Since(began); took > cutLasts+silentFor {
		t.Errorf("it worked again %s after the cut", took)
	}
}

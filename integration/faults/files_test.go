package faults

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

// limited returns a command that may have only so many open files.
func limited(files int, args ...string) *exec.Cmd {
	return exec.Command("prlimit", append([]string{fmt.Sprintf("--nofile=%d:%[1]d", files), "--"}, args...)...)
}

// openFiles returns how many files a program has open.
func openFiles(t testing.TB, p *harness.Process) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.Cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// cpuTime returns the processor time that a program has taken so far.
func cpuTime(t testing.TB, p *harness.Process) time.Duration {
	t.Helper()
	_, rest, _ := strings.Cut(harness.Read(t, fmt.Sprintf("/proc/%d/stat", p.Cmd.Process.Pid)), ") ")
	var user, system int
	fields := strings.Fields(rest)
	if _, err := fmt.Sscan(fields[11]+" "+fields[12], &user, &system); err != nil {
		t.Fatal(err)
	}
	return time.Duration(user+system) * 10 * time.Millisecond
}

// openConnections connects until a program has no more descriptors, and says nothing. It
// returns what hangs up.
func openConnections(t testing.TB, p *harness.Process, limit int, network, address string) (leave func()) {
	t.Helper()
	var conns []net.Conn
	for range limit + 20 {
		conn, err := net.Dial(network, address)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	harness.Await(t, "no more descriptors", func() error {
		if n := openFiles(t, p); n < limit {
			return fmt.Errorf("%d are open", n)
		}
		return nil
	})
	return func() {
		for _, conn := range conns {
			conn.Close()
		}
	}
}

// expectIdle checks that the program does not take the processor's time for nothing.
func expectIdle(t testing.TB, p *harness.Process) {
	t.Helper()
	const watched = 2 * time.Second
	before := cpuTime(t, p)
	time.Sleep(watched)
	if took := cpuTime(t, p) - before; took > watched/10 {
		t.Errorf("%s takes %s of processor time in %s", p.Cmd.Args[3], took, watched)
	}
}

// expectFilesClosed checks that the program has closed what it opened.
func expectFilesClosed(t testing.TB, p *harness.Process, before int) {
	t.Helper()
	harness.Await(t, "descriptors", func() error {
		if n := openFiles(t, p); n > before+8 {
			return fmt.Errorf("%d are open, and %d were before", n, before)
		}
		return nil
	})
}

// TestPilotOutOfFiles takes all descriptors that pilot may have, on both its
// sockets.
func TestPilotOutOfFiles(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	image := c.Image(harness.LayerKinds[1], "provider:pilot:team-a")
	home := harness.TempDir(t)
	const limit = 64
	p := harness.Start(t, home, "pilot", limited(limit, "pilot", "serve", "--config", "/dev/null", "--listen", "unix://"+home+"/keyprovider.sock", "--broker", c.BrokerURL,
		"--diff-listen", "unix://"+home+"/diff.sock", "--containerd", home+"/containerd.sock", "--layer-record", home+"/layers", "--kek-cache-size", "0", "--broker-timeout", "10s", "--admin-listen", "unix://"+home+"/admin.sock"))
	harness.Await(t, "pilot", harness.Reachable(home+"/diff.sock"))
	n := harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: harness.Containerd2()})
	pull := func() *exec.Cmd { return n.Crictl("pull", image) }
	harness.Output(t, pull()) // containerd and pilot are connected now
	harness.Output(t, n.Crictl("rmi", image))
	k := harness.NewPilotClient(t, home)
	annotation, err := k.Wrap(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	before, goroutines := openFiles(t, p), k.Metric(t, "go_goroutines")

	for _, socket := range []string{"keyprovider", "diff"} {
		t.Run(socket, func(t *testing.T) {
			leave := openConnections(t, p, limit, "unix", home+"/"+socket+".sock")
			expectIdle(t, p)
			// It has one connection to its broker, for which these wait.
			var callers sync.WaitGroup
			for range 8 {
				callers.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), harness.Timeout)
					defer cancel()
					if err := k.Unwrap(ctx, annotation); err != nil && !(strings.Contains(err.Error(), `KEK "team-a"`) && strings.Contains(err.Error(), "too many open files")) {
						t.Error(err)
					}
				})
			}
			callers.Wait()
			harness.ExpectFailure(t, pull(), "pilot: layer sha256:", "too many open files")
			n.ExpectNoSnapshots(t)
			if socket == "keyprovider" {
				// A client that sends nothing is disconnected after a while.
				expectFilesClosed(t, p, before)
			}
			leave()
			if err := k.Unwrap(t.Context(), annotation); err != nil {
				t.Error(err)
			}
			harness.Output(t, pull())
			harness.Output(t, n.Crictl("rmi", image))
			n.ExpectNoSnapshots(t)
			expectFilesClosed(t, p, before)
		})
	}

	// More callers than it can serve at once, who hang up when they are served.
	var callers sync.WaitGroup
	for range 4 * limit {
		callers.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), harness.Timeout)
			defer cancel()
			caller := harness.NewPilotClient(t, home)
			if err := caller.Unwrap(ctx, annotation); err != nil {
				t.Error(err)
			}
			caller.Conn.Close()
		})
	}
	callers.Wait()
	expectFilesClosed(t, p, before)
	k.CheckLeaks(t, "go_goroutines", goroutines)
}

// TestCopilotOutOfFiles takes all descriptors that copilot may have.
func TestCopilotOutOfFiles(t *testing.T) {
	t.Parallel()
	b := harness.NewTLSBroker(t, "team-a")
	b.Process.Stop(t)
	const limit = 64
	p := harness.Start(t, b.Dir, "copilot", limited(limit, "copilot", "serve", "--config", b.Dir+"/copilot.toml", "--listen", b.Address, "--listen", "unix://"+b.Dir+"/copilot.sock"))
	harness.Await(t, "copilot", harness.Reachable(b.Dir+"/copilot.sock"))
	cert, key := b.Enroll(t, "worker-7")
	home := b.Dir + "/node"
	harness.StartPilot(t, home, b.URL(), "--broker-ca", b.Dir+"/ca.pem", "--broker-cert", cert, "--broker-key", key, "--broker-timeout", "10s",
		"--kek-cache-size", "0", "--diff-listen", "off", "--admin-listen", "unix://"+home+"/admin.sock")
	k := harness.NewPilotClient(t, home)
	annotation, err := k.Wrap(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	before := openFiles(t, p)
	config := b.ClientTLS(t, cert, key)
	for name, address := range map[string]string{"tcp": b.Address, "unix": b.Dir + "/copilot.sock"} {
		t.Run(name, func(t *testing.T) {
			var began time.Time
			var leave func()
			// pilot goes on over the connection that it has, unless copilot is held up, so that it
			// takes another one before.
			harness.Await(t, "pilot goes on", func() error {
				began, leave = time.Now(), openConnections(t, p, limit, name, address)
				expectIdle(t, p)
				err := k.Unwrap(t.Context(), annotation)
				if err != nil {
					leave()
					harness.Await(t, "a connection", func() error { return k.Unwrap(t.Context(), annotation) })
				}
				return err
			})
			dialer := tls.Dialer{Config: config}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			conn, err := dialer.DialContext(ctx, "tcp", b.Address)
			if err == nil {
				conn.Close()
				if time.Since(began) < 9*time.Second { // copilot closes silent ones after ten
					t.Error("another connection was taken")
				}
			}
			leave()
			harness.Await(t, "another connection", func() error {
				ctx, cancel := context.WithTimeout(t.Context(), harness.Timeout/4)
				defer cancel()
				conn, err := dialer.DialContext(ctx, "tcp", b.Address)
				if err == nil {
					conn.Close()
				}
				return err
			})
			if err := k.Unwrap(t.Context(), annotation); err != nil {
				t.Error(err)
			}
			expectFilesClosed(t, p, before)
		})
	}
	harness.Output(t, b.Command(t, "audit", "verify"))
}

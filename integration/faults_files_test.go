package integration

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

	"github.com/ctrlplane/pilot/internal/certfile"
)

// limited returns a command that may have only so many open files.
func limited(files int, args ...string) *exec.Cmd {
	return exec.Command("prlimit", append([]string{fmt.Sprintf("--nofile=%d:%[1]d", files), "--"}, args...)...)
}

// files returns how many files a program has open.
func (p *process) files(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// cpu returns the processor time that a program has taken so far.
func (p *process) cpu(t testing.TB) time.Duration {
	t.Helper()
	_, rest, _ := strings.Cut(read(t, fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid)), ") ")
	var user, system int
	fields := strings.Fields(rest)
	if _, err := fmt.Sscan(fields[11]+" "+fields[12], &user, &system); err != nil {
		t.Fatal(err)
	}
	return time.Duration(user+system) * 10 * time.Millisecond
}

// crowd connects until a program has no more descriptors, and says nothing. It
// returns what hangs up.
func (p *process) crowd(t testing.TB, limit int, network, address string) (leave func()) {
	t.Helper()
	var conns []net.Conn
	for range limit + 20 {
		conn, err := net.Dial(network, address)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	await(t, "no more descriptors", func() error {
		if n := p.files(t); n < limit {
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

// rests checks that the program does not take the processor's time for nothing.
func (p *process) rests(t testing.TB) {
	t.Helper()
	const watched = 2 * time.Second
	before := p.cpu(t)
	time.Sleep(watched)
	if took := p.cpu(t) - before; took > watched/10 {
		t.Errorf("%s takes %s of processor time in %s", p.cmd.Args[3], took, watched)
	}
}

// closes checks that the program has closed what it opened.
func (p *process) closes(t testing.TB, before int) {
	t.Helper()
	await(t, "descriptors", func() error {
		if n := p.files(t); n > before+8 {
			return fmt.Errorf("%d are open, and %d were before", n, before)
		}
		return nil
	})
}

// TestPilotOutOfFiles takes all descriptors that pilot may have, on both its
// sockets.
func TestPilotOutOfFiles(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newCI(t, dir+"/ci", ociConf)
	image := c.image(kinds[1], "provider:pilot:team-a")
	home := tempDir(t)
	const limit = 64
	p := start(t, home, "pilot", limited(limit, "pilot", "serve", "--config", "/dev/null", "--listen", "unix://"+home+"/keyprovider.sock", "--broker", brokerURL,
		"--diff-listen", "unix://"+home+"/diff.sock", "--containerd", home+"/containerd.sock", "--kek-cache-size", "0", "--broker-timeout", "10s", "--admin-listen", "unix://"+home+"/admin.sock"))
	await(t, "pilot", answers(home+"/diff.sock"))
	n := newDifferNode(t, home, differNode{v: containerd2()})
	pull := func() *exec.Cmd { return n.crictl("pull", image) }
	output(t, pull()) // containerd and pilot are connected now
	output(t, n.crictl("rmi", image))
	k := askPilot(t, home)
	annotation, err := k.wrap(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	before, goroutines := p.files(t), k.metric(t, "go_goroutines")

	for _, socket := range []string{"keyprovider", "diff"} {
		t.Run(socket, func(t *testing.T) {
			leave := p.crowd(t, limit, "unix", home+"/"+socket+".sock")
			p.rests(t)
			// It has one connection to its broker, for which these wait.
			var callers sync.WaitGroup
			for range 8 {
				callers.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), patience)
					defer cancel()
					if err := k.unwrap(ctx, annotation); err != nil && !(strings.Contains(err.Error(), `KEK "team-a"`) && strings.Contains(err.Error(), "too many open files")) {
						t.Error(err)
					}
				})
			}
			callers.Wait()
			fails(t, pull(), "pilot: layer sha256:", "too many open files")
			n.noSnapshots(t)
			if socket == "keyprovider" {
				// Whoever says nothing is sent away after a while.
				p.closes(t, before)
			}
			leave()
			if err := k.unwrap(t.Context(), annotation); err != nil {
				t.Error(err)
			}
			output(t, pull())
			output(t, n.crictl("rmi", image))
			n.noSnapshots(t)
			p.closes(t, before)
		})
	}

	// More callers than it can serve at once, who hang up when they are served.
	var callers sync.WaitGroup
	for range 4 * limit {
		callers.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			caller := askPilot(t, home)
			if err := caller.unwrap(ctx, annotation); err != nil {
				t.Error(err)
			}
			caller.conn.Close()
		})
	}
	callers.Wait()
	p.closes(t, before)
	k.flat(t, "go_goroutines", goroutines)
}

// TestCopilotOutOfFiles takes all descriptors that copilot may have.
func TestCopilotOutOfFiles(t *testing.T) {
	t.Parallel()
	b := initialized(t, "team-a")
	b.process.stop(t)
	const limit = 64
	p := start(t, b.dir, "copilot", limited(limit, "copilot", "serve", "--config", b.dir+"/copilot.toml", "--listen", b.address, "--listen", "unix://"+b.dir+"/copilot.sock"))
	await(t, "copilot", answers(b.dir+"/copilot.sock"))
	cert, key := b.enroll(t, "worker-7")
	home := b.dir + "/node"
	pilot(t, home, b.url(), "--broker-ca", b.dir+"/ca.pem", "--broker-cert", cert, "--broker-key", key, "--broker-timeout", "10s",
		"--kek-cache-size", "0", "--diff-listen", "off", "--admin-listen", "unix://"+home+"/admin.sock")
	k := askPilot(t, home)
	annotation, err := k.wrap(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	before := p.files(t)
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	pool, err := certfile.Pool(b.dir + "/ca.pem")
	if err != nil {
		t.Fatal(err)
	}
	for name, address := range map[string]string{"tcp": b.address, "unix": b.dir + "/copilot.sock"} {
		t.Run(name, func(t *testing.T) {
			leave := p.crowd(t, limit, name, address)
			p.rests(t)
			// pilot goes on over the connection that it has.
			if err := k.unwrap(t.Context(), annotation); err != nil {
				t.Error(err)
			}
			dialer := tls.Dialer{Config: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{pair}}}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			conn, err := dialer.DialContext(ctx, "tcp", b.address)
			if err == nil {
				conn.Close()
				t.Error("another connection was taken")
			}
			leave()
			await(t, "another connection", func() error {
				ctx, cancel := context.WithTimeout(t.Context(), patience/4)
				defer cancel()
				conn, err := dialer.DialContext(ctx, "tcp", b.address)
				if err == nil {
					conn.Close()
				}
				return err
			})
			if err := k.unwrap(t.Context(), annotation); err != nil {
				t.Error(err)
			}
			p.closes(t, before)
		})
	}
	output(t, b.command(t, "audit", "verify"))
}

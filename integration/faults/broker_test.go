package faults

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

// brokerFaults are what may be wrong with a broker.
var brokerFaults = map[string]func(*net.TCPConn, *harness.FaultyProxy){
	"hangs up at once": func(*net.TCPConn, *harness.FaultyProxy) {},
	"says nothing":     func(c *net.TCPConn, _ *harness.FaultyProxy) { io.Copy(io.Discard, c) },
	"says a byte a second": func(c *net.TCPConn, f *harness.FaultyProxy) {
		f.Relay(c, func(w io.Writer, r io.Reader) {
			b := make([]byte, 1)
			for {
				if _, err := r.Read(b); err != nil {
					return
				}
				if _, err := w.Write(b); err != nil {
					return
				}
				time.Sleep(time.Second)
			}
		})
	},
	"says garbage": func(c *net.TCPConn, _ *harness.FaultyProxy) {
		c.Read(make([]byte, 1))
		c.Write([]byte("\x00\x01\x02 220 smtp.example.com ESMTP\r\n\r\n"))
	},
	"says garbage without end": func(c *net.TCPConn, _ *harness.FaultyProxy) {
		c.Read(make([]byte, 1))
		line := []byte(strings.Repeat("x", 64<<10))
		c.Write([]byte("HTTP/1.1 200 OK\r\n\r\n"))
		for range 1 << 10 {
			if _, err := c.Write(line); err != nil {
				return
			}
		}
	},
	"has headers without end": func(c *net.TCPConn, _ *harness.FaultyProxy) {
		c.Read(make([]byte, 1))
		c.Write([]byte("HTTP/1.1 200 OK\r\n"))
		for i := range 1 << 20 {
			if _, err := fmt.Fprintf(c, "X-%d: y\r\n", i); err != nil {
				return
			}
		}
	},
	"resets the connection": func(c *net.TCPConn, _ *harness.FaultyProxy) {
		c.Read(make([]byte, 1))
		c.SetLinger(0)
	},
	"breaks off in the middle": func(c *net.TCPConn, f *harness.FaultyProxy) {
		f.Relay(c, func(w io.Writer, r io.Reader) {
			b := make([]byte, 60)
			n, _ := io.ReadFull(r, b)
			w.Write(b[:n])
		})
	},
	"resets in the middle": func(c *net.TCPConn, f *harness.FaultyProxy) {
		f.Relay(c, func(w io.Writer, r io.Reader) {
			io.CopyN(w, r, 100)
			time.Sleep(10 * time.Millisecond)
			c.SetLinger(0)
		})
	},
	"is another service": func(c *net.TCPConn, _ *harness.FaultyProxy) {
		c.Read(make([]byte, 1))
		c.Write([]byte("HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n<html>it works</html>"))
	},
	"sends elsewhere": func(c *net.TCPConn, f *harness.FaultyProxy) {
		c.Read(make([]byte, 1))
		fmt.Fprintf(c, "HTTP/1.1 307 Temporary Redirect\r\nLocation: http://%s/\r\nContent-Length: 0\r\n\r\n", f.Broker)
	},
	"is overloaded": func(c *net.TCPConn, _ *harness.FaultyProxy) {
		c.Read(make([]byte, 1))
		c.Write([]byte("HTTP/1.1 503 Service Unavailable\r\nRetry-After: 3600\r\nContent-Length: 0\r\n\r\n"))
	},
}

// TestFaultyBrokerFailsInTime has a broker do everything that one should not. Each request
// ends in time with an error that says so, or is answered by another broker; the
// next works; and nothing is left in pilot.
func TestFaultyBrokerFailsInTime(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	dir := harness.TempDir(t)
	proxy := harness.StartBrokerBehindProxy(t, dir, "team-a")

	const timeout = 4 * time.Second
	args := []string{"--broker-timeout", timeout.String(), "--kek-cache-size", "0", "--diff-listen", "off"}
	harness.StartPilot(t, dir+"/one", proxy.URL, append(args, "--admin-listen", "unix://"+dir+"/one/admin.sock")...)
	one := harness.NewPilotClient(t, dir+"/one")
	// Another has a broker to turn to.
	harness.StartPilot(t, dir+"/two", proxy.URL+",unix://"+dir+"/copilot.sock", append(args, "--admin-listen", "unix://"+dir+"/two/admin.sock")...)
	two := harness.NewPilotClient(t, dir+"/two")

	annotation, err := one.Wrap(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := two.Unwrap(t.Context(), annotation); err != nil {
		t.Fatal(err)
	}
	goroutines, files := one.Metric(t, "go_goroutines"), one.Metric(t, "process_open_fds")
	for what, fault := range brokerFaults {
		t.Run(what, func(t *testing.T) {
			proxy.SetFault(fault)
			for name, ask := range map[string]func(*harness.PilotClient) error{
				"wrap":   func(k *harness.PilotClient) error { _, err := k.Wrap(t.Context()); return err },
				"unwrap": func(k *harness.PilotClient) error { return k.Unwrap(t.Context(), annotation) },
			} {
				start := time.Now()
				err := ask(one)
				if took := time.Since(start); took > timeout+harness.Timeout/4 {
					t.Errorf("%s: the error took %s", name, took)
				}
				if err == nil || !strings.Contains(err.Error(), `KEK "team-a"`) || !strings.Contains(err.Error(), "copilot at "+proxy.URL) || strings.ContainsAny(err.Error(), "\n\x00") {
					t.Errorf("%s: %v", name, err)
				}
				if err := ask(two); err != nil {
					t.Errorf("%s with another broker: %v", name, err)
				}
			}
			proxy.SetFault(harness.NoFault)
			harness.Await(t, "the next", func() error { return one.Unwrap(t.Context(), annotation) })
		})
	}
	// Requests whose callers have gone, while the broker hangs.
	proxy.SetFault(brokerFaults["says nothing"])
	var callers sync.WaitGroup
	for range 200 {
		callers.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			if err := one.Unwrap(ctx, annotation); err == nil {
				t.Error("unwrapped without a broker")
			}
		})
	}
	callers.Wait()
	proxy.SetFault(harness.NoFault)
	harness.Await(t, "the next", func() error { return one.Unwrap(t.Context(), annotation) })
	one.CheckLeaks(t, "go_goroutines", goroutines)
	one.CheckLeaks(t, "process_open_fds", files)
}

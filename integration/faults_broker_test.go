package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	ocicryptpb "github.com/containers/ocicrypt/utils/keyprovider"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// faulty is what stands between pilot and a broker, and passes on what they say
// to each other, or does what a bad network or broker does.
type faulty struct {
	url    string
	broker string // HOST:PORT

	mu    sync.Mutex
	fault func(client *net.TCPConn, f *faulty)
	conns map[net.Conn]bool
}

func newFaulty(t testing.TB, broker string) *faulty {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &faulty{url: "http://" + l.Addr().String(), broker: broker, fault: pass, conns: make(map[net.Conn]bool)}
	t.Cleanup(func() { l.Close(); f.set(nil) })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			f.mu.Lock()
			fault := f.fault
			f.conns[conn] = true
			f.mu.Unlock()
			go func() {
				defer conn.Close()
				if fault != nil {
					fault(conn.(*net.TCPConn), f)
				}
			}()
		}
	}()
	return f
}

// set makes a fault, and ends all connections that there are.
func (f *faulty) set(fault func(*net.TCPConn, *faulty)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fault = fault
	for conn := range f.conns {
		conn.Close()
	}
	clear(f.conns)
}

// pass is no fault.
func pass(client *net.TCPConn, f *faulty) {
	f.relay(client, func(w io.Writer, r io.Reader) { io.Copy(w, r) })
}

// relay passes on what the client says, and has answer do so with the answer.
func (f *faulty) relay(client *net.TCPConn, answer func(io.Writer, io.Reader)) {
	broker, err := net.Dial("tcp", f.broker)
	if err != nil {
		return
	}
	defer broker.Close()
	go func() {
		io.Copy(broker, client)
		broker.(*net.TCPConn).CloseWrite()
	}()
	answer(client, broker)
}

// brokerFaults are what may be wrong with a broker.
var brokerFaults = map[string]func(*net.TCPConn, *faulty){
	"hangs up at once": func(*net.TCPConn, *faulty) {},
	"says nothing":     func(c *net.TCPConn, _ *faulty) { io.Copy(io.Discard, c) },
	"says a byte a second": func(c *net.TCPConn, f *faulty) {
		f.relay(c, func(w io.Writer, r io.Reader) {
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
	"says garbage": func(c *net.TCPConn, _ *faulty) {
		c.Read(make([]byte, 1))
		c.Write([]byte("\x00\x01\x02 220 smtp.example.com ESMTP\r\n\r\n"))
	},
	"says garbage without end": func(c *net.TCPConn, _ *faulty) {
		c.Read(make([]byte, 1))
		line := []byte(strings.Repeat("x", 64<<10))
		c.Write([]byte("HTTP/1.1 200 OK\r\n\r\n"))
		for range 1 << 10 {
			if _, err := c.Write(line); err != nil {
				return
			}
		}
	},
	"has headers without end": func(c *net.TCPConn, _ *faulty) {
		c.Read(make([]byte, 1))
		c.Write([]byte("HTTP/1.1 200 OK\r\n"))
		for i := range 1 << 20 {
			if _, err := fmt.Fprintf(c, "X-%d: y\r\n", i); err != nil {
				return
			}
		}
	},
	"resets the connection": func(c *net.TCPConn, _ *faulty) {
		c.Read(make([]byte, 1))
		c.SetLinger(0)
	},
	"breaks off in the middle": func(c *net.TCPConn, f *faulty) {
		f.relay(c, func(w io.Writer, r io.Reader) {
			b := make([]byte, 60)
			n, _ := io.ReadFull(r, b)
			w.Write(b[:n])
		})
	},
	"resets in the middle": func(c *net.TCPConn, f *faulty) {
		f.relay(c, func(w io.Writer, r io.Reader) {
			io.CopyN(w, r, 100)
			time.Sleep(10 * time.Millisecond)
			c.SetLinger(0)
		})
	},
	"is another service": func(c *net.TCPConn, _ *faulty) {
		c.Read(make([]byte, 1))
		c.Write([]byte("HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n<html>it works</html>"))
	},
	"sends elsewhere": func(c *net.TCPConn, f *faulty) {
		c.Read(make([]byte, 1))
		fmt.Fprintf(c, "HTTP/1.1 307 Temporary Redirect\r\nLocation: http://%s/\r\nContent-Length: 0\r\n\r\n", f.broker)
	},
	"is overloaded": func(c *net.TCPConn, _ *faulty) {
		c.Read(make([]byte, 1))
		c.Write([]byte("HTTP/1.1 503 Service Unavailable\r\nRetry-After: 3600\r\nContent-Length: 0\r\n\r\n"))
	},
}

// keys asks a key provider, and looks at its process.
type keys struct {
	conn  *grpc.ClientConn
	admin http.Client
}

// askPilot returns a client of the pilot with sockets keyprovider.sock and
// admin.sock in dir.
func askPilot(t testing.TB, dir string) *keys {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+dir+"/keyprovider.sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	k := &keys{conn: conn}
	k.admin.Transport = &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", dir+"/admin.sock")
	}}
	return k
}

// wrap has a layer key wrapped with the KEK team-a and returns the annotation.
func (k *keys) wrap(ctx context.Context) ([]byte, error) {
	return k.ask(ctx, ocicryptpb.NewKeyProviderServiceClient(k.conn).WrapKey,
		object{"op": "keywrap", "keywrapparams": object{"ec": object{"Parameters": object{"pilot": []string{"dGVhbS1h"}}}, "optsdata": "c2VjcmV0"}},
		func(a answer) []byte { return a.Wrapped.Annotation })
}

// unwrap has it unwrapped.
func (k *keys) unwrap(ctx context.Context, annotation []byte) error {
	b, err := k.ask(ctx, ocicryptpb.NewKeyProviderServiceClient(k.conn).UnWrapKey,
		object{"op": "keyunwrap", "keyunwrapparams": object{"dc": object{}, "annotation": annotation}},
		func(a answer) []byte { return a.Unwrapped.OptsData })
	if err == nil && string(b) != "secret" {
		err = fmt.Errorf("unwrapped %q", b)
	}
	return err
}

type answer struct {
	Wrapped   struct{ Annotation []byte } `json:"keywrapresults"`
	Unwrapped struct{ OptsData []byte }   `json:"keyunwrapresults"`
}

func (k *keys) ask(ctx context.Context, call func(context.Context, *ocicryptpb.KeyProviderKeyWrapProtocolInput, ...grpc.CallOption) (*ocicryptpb.KeyProviderKeyWrapProtocolOutput, error), in object, result func(answer) []byte) ([]byte, error) {
	b, err := json.Marshal(in)
	if err != nil {
		return nil, err
	}
	out, err := call(ctx, &ocicryptpb.KeyProviderKeyWrapProtocolInput{KeyProviderKeyWrapProtocolInput: b})
	if err != nil {
		return nil, err
	}
	var a answer
	err = json.Unmarshal(out.GetKeyProviderKeyWrapProtocolOutput(), &a)
	return result(a), err
}

// metric returns what pilot tells Prometheus of a metric without labels.
func (k *keys) metric(t testing.TB, name string) float64 {
	t.Helper()
	r, err := k.admin.Get("http://pilot/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut("\n"+string(b), "\n"+name+" ")
	value, _, _ := strings.Cut(rest, "\n")
	f, err := strconv.ParseFloat(value, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return f
}

// flat checks that the process has as many goroutines and open files as before,
// but for a few connections that are kept.
func (k *keys) flat(t testing.TB, name string, before float64) {
	t.Helper()
	await(t, name, func() error {
		if now := k.metric(t, name); now > before+8 {
			return fmt.Errorf("%g, and %g before", now, before)
		}
		return nil
	})
}

// TestBrokerFaults has a broker do everything that one should not. Each request
// ends in time with an error that says so, or is answered by another broker; the
// next works; and nothing is left in pilot.
func TestBrokerFaults(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	broker(t, dir, "team-a")
	// Another with the same KEK, behind the faults.
	address, behind := loopbacktest.FreeAddress(t), dir+"/behind"
	output(t, command(t, "copilot", "keys", "import", "--dir", behind, "--file", dir+"/key", "team-a"))
	start(t, behind, "copilot", exec.Command("copilot", "serve", "--dir", behind, "--insecure-loopback", "--listen", address))
	await(t, "copilot", func() error {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
		}
		return err
	})
	proxy := newFaulty(t, address)

	const timeout = 4 * time.Second
	args := []string{"--broker-timeout", timeout.String(), "--kek-cache-size", "0", "--diff-listen", "off"}
	pilot(t, dir+"/one", proxy.url, append(args, "--admin-listen", "unix://"+dir+"/one/admin.sock")...)
	one := askPilot(t, dir+"/one")
	// Another has a broker to turn to.
	pilot(t, dir+"/two", proxy.url+",unix://"+dir+"/copilot.sock", append(args, "--admin-listen", "unix://"+dir+"/two/admin.sock")...)
	two := askPilot(t, dir+"/two")

	annotation, err := one.wrap(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := two.unwrap(t.Context(), annotation); err != nil {
		t.Fatal(err)
	}
	goroutines, files := one.metric(t, "go_goroutines"), one.metric(t, "process_open_fds")
	for what, fault := range brokerFaults {
		t.Run(what, func(t *testing.T) {
			proxy.set(fault)
			for name, ask := range map[string]func(*keys) error{
				"wrap":   func(k *keys) error { _, err := k.wrap(t.Context()); return err },
				"unwrap": func(k *keys) error { return k.unwrap(t.Context(), annotation) },
			} {
				start := time.Now()
				err := ask(one)
				if took := time.Since(start); took > timeout+patience/4 {
					t.Errorf("%s: the error took %s", name, took)
				}
				if err == nil || !strings.Contains(err.Error(), `KEK "team-a"`) || !strings.Contains(err.Error(), "copilot at "+proxy.url) || strings.ContainsAny(err.Error(), "\n\x00") {
					t.Errorf("%s: %v", name, err)
				}
				if err := ask(two); err != nil {
					t.Errorf("%s with another broker: %v", name, err)
				}
			}
			proxy.set(pass)
			await(t, "the next", func() error { return one.unwrap(t.Context(), annotation) })
		})
	}
	// Requests whose callers have gone, while the broker hangs.
	proxy.set(brokerFaults["says nothing"])
	var callers sync.WaitGroup
	for range 200 {
		callers.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			if err := one.unwrap(ctx, annotation); err == nil {
				t.Error("unwrapped without a broker")
			}
		})
	}
	callers.Wait()
	proxy.set(pass)
	await(t, "the next", func() error { return one.unwrap(t.Context(), annotation) })
	one.flat(t, "go_goroutines", goroutines)
	one.flat(t, "process_open_fds", files)
}

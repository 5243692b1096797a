package harness

import (
	"io"
	"net"
	"os/exec"
	"sync"
	"testing"

	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// FaultyProxy is what stands between pilot and a broker, and passes on what they say
// to each other, or does what a bad network or broker does.
type FaultyProxy struct {
	URL    string
	Broker string // HOST:PORT
	Dir    string // the broker's, if StartBrokerBehindProxy has started it

	mu    sync.Mutex
	fault func(client *net.TCPConn, f *FaultyProxy)
	conns map[net.Conn]bool
}

func NewFaultyProxy(t testing.TB, broker string) *FaultyProxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &FaultyProxy{URL: "http://" + l.Addr().String(), Broker: broker, fault: NoFault, conns: make(map[net.Conn]bool)}
	t.Cleanup(func() { l.Close(); f.SetFault(nil) })
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

// StartBrokerBehindProxy starts a broker in dir with a KEK, and another with the same one
// behind the proxy that it returns.
func StartBrokerBehindProxy(t testing.TB, dir, kek string) *FaultyProxy {
	t.Helper()
	StartBroker(t, dir, kek)
	address, behind := loopbacktest.FreeAddress(t), dir+"/behind"
	Output(t, Command(t, "copilot", "keys", "import", "--dir", behind, "--file", dir+"/key", kek))
	Start(t, behind, "copilot", exec.Command("copilot", "serve", "--dir", behind, "--insecure-loopback", "--listen", address))
	Await(t, "copilot", Listening(address))
	f := NewFaultyProxy(t, address)
	f.Dir = behind
	return f
}

// SetFault makes a fault, and ends all connections that there are.
func (f *FaultyProxy) SetFault(fault func(*net.TCPConn, *FaultyProxy)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fault = fault
	for conn := range f.conns {
		conn.Close()
	}
	clear(f.conns)
}

// NoFault is no fault.
func NoFault(client *net.TCPConn, f *FaultyProxy) {
	f.Relay(client, func(w io.Writer, r io.Reader) { io.Copy(w, r) })
}

// Relay passes on what the client says, and has answer do so with the answer.
func (f *FaultyProxy) Relay(client *net.TCPConn, answer func(io.Writer, io.Reader)) {
	broker, err := net.Dial("tcp", f.Broker)
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

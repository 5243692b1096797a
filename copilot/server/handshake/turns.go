package server

import (
	"crypto/tls"
	"errors"
	"net"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"
)

// handshakeWait is how long a connection waits for its turn: as long as pilot
// gives a try.
const handshakeWait = 5 * time.Second

var errOverload = errors.New("copilot is overloaded: the connection waited too long for its TLS handshake")

// handshakes bounds how many TLS handshakes are worked on at once, in the order
// in which clients said hello, and leaves out those who gave up meanwhile. When
// thousands of nodes come back together, some are then served soon; if all were
// worked on at once, all would run out of time and come again. Clients that are
// slow, or say nothing, have no turn and keep nobody waiting.
type handshakes struct {
	turns chan struct{}
	shed  prometheus.Counter
}

func newHandshakes(shed prometheus.Counter) *handshakes {
	return &handshakes{turns: make(chan struct{}, 2*runtime.GOMAXPROCS(0)), shed: shed}
}

// listener returns l with TLS as conf tells it for each connection.
func (h *handshakes) listener(l net.Listener, conf *tls.Config) net.Listener {
	limited := conf.Clone()
	limited.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if err := hello.Conn.(*turn).take(hello); err != nil {
			return nil, err
		}
		return conf.GetConfigForClient(hello)
	}
	return tls.NewListener(turns{l, h}, limited)
}

type turns struct {
	net.Listener
	*handshakes
}

func (t turns) Accept() (net.Conn, error) {
	c, err := t.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &turn{Conn: c, handshakes: t.handshakes}, nil
}

// turn is a connection that has its turn from when it has said hello to when it
// is answered: the server's signature and key agreement, and no waiting for the
// client. What follows, such as looking at its certificate, is not bounded.
type turn struct {
	net.Conn
	*handshakes
	taken atomic.Bool
}

func (t *turn) take(hello *tls.ClientHelloInfo) error {
	select {
	case t.turns <- struct{}{}:
		t.taken.Store(true)
		return nil
	default:
	}
	timer := time.NewTimer(handshakeWait)
	defer timer.Stop()
	select {
	case t.turns <- struct{}{}:
		t.taken.Store(true)
	case <-timer.C:
		t.shed.Inc()
		return errOverload
	case <-hello.Context().Done():
		return hello.Context().Err()
	}
	if t.left() {
		t.shed.Inc()
		return errOverload // nobody hears it
	}
	return nil
}

// left reports whether the client has closed the connection.
func (t *turn) left() bool {
	tcp, ok := t.Conn.(*net.TCPConn)
	if !ok {
		return false
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return true
	}
	left := true
	raw.Control(func(fd uintptr) {
		n, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
		left = n == 0 || err != nil && err != unix.EAGAIN
	})
	return left
}

func (t *turn) end() {
	if t.taken.CompareAndSwap(true, false) {
		<-t.turns
	}
}

func (t *turn) Write(b []byte) (int, error) {
	t.end()
	return t.Conn.Write(b)
}

func (t *turn) Close() error {
	t.end()
	return t.Conn.Close()
}

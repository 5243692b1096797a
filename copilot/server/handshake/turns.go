package handshake

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"net"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// turnTimeout is how long a connection waits for its turn: as long as pilot waits for
// one attempt.
const turnTimeout = 5 * time.Second

// ErrOverload is the error of a connection that waited too long for its turn.
var ErrOverload = errors.New("copilot is overloaded: the connection waited too long for its TLS handshake")

// Turns bounds how many handshakes are computed at once, in the order in which clients
// sent their hello, and skips clients that gave up meanwhile. When thousands of nodes
// reconnect at the same time, some are then served soon. Without the bound, all would
// time out and retry. Clients that are slow or silent take no turn, and delay nobody.
type Turns struct {
	slots chan struct{}
	shed  prometheus.Counter
}

// NewTurns returns turns for this machine's processors. Shed counts the connections that
// got none.
func NewTurns(shed prometheus.Counter) *Turns {
	return &Turns{slots: make(chan struct{}, 2*runtime.GOMAXPROCS(0)), shed: shed}
}

// config returns conf with the wait for a turn.
func (t *Turns) config(conf *tls.Config) *tls.Config {
	limited := conf.Clone()
	limited.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if err := hello.Conn.(*turn).take(hello); err != nil {
			return nil, err
		}
		return conf.GetConfigForClient(hello)
	}
	return limited
}

// turn is a connection that has its turn from its hello until the server's answer is
// written: signature and key agreement, without waiting for the client. What follows,
// such as verifying the client's certificate, is not bounded.
type turn struct {
	net.Conn
	turns    *Turns
	taken    atomic.Bool
	answered atomic.Bool // with its certificate
}

// NetConn returns the connection under it.
func (t *turn) NetConn() net.Conn { return t.Conn }

func (t *turn) take(hello *tls.ClientHelloInfo) error {
	select {
	case t.turns.slots <- struct{}{}:
		t.taken.Store(true)
		return nil
	default:
	}
	timer := time.NewTimer(turnTimeout)
	defer timer.Stop()
	select {
	case t.turns.slots <- struct{}{}:
		t.taken.Store(true)
	case <-timer.C:
		t.turns.shed.Inc()
		return ErrOverload
	case <-hello.Context().Done():
		return hello.Context().Err()
	}
	if t.left() {
		t.turns.shed.Inc()
		return ErrOverload // the client does not see it
	}
	return nil
}

// left reports whether the client has closed the connection.
func (t *turn) left() bool {
	var c net.Conn = t
	for {
		wrapper, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		c = wrapper.NetConn()
	}
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return false
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return true
	}
	left := true
	raw.Control(func(fd uintptr) { left = ended(fd) })
	return left
}

func (t *turn) end() {
	if t.taken.CompareAndSwap(true, false) {
		<-t.turns.slots
	}
}

// recordHandshake is the type of a TLS record with handshake messages: RFC 8446, section
// 5.1. An alert has another.
const recordHandshake = 22

// retryRandom is the random of a HelloRetryRequest, by which it differs from a
// ServerHello: RFC 8446, section 4.1.3.
var retryRandom = sha256.Sum256([]byte("HelloRetryRequest"))

func (t *turn) Write(b []byte) (int, error) {
	t.end()
	if len(b) > 0 && b[0] == recordHandshake && !asksForAnotherHello(b) {
		t.answered.Store(true)
	}
	return t.Conn.Write(b)
}

// asksForAnotherHello reports whether the server asks the client for another hello, since
// it can't use the key share in the first: the client has no certificate of ours yet.
func asksForAnotherHello(record []byte) bool {
	const random = 5 + 4 + 2 // after the headers of the record and the message, and the version
	return len(record) >= random+len(retryRandom) && bytes.Equal(record[random:random+len(retryRandom)], retryRandom[:])
}

func (t *turn) Close() error {
	t.end()
	return t.Conn.Close()
}

// Package handshake listens for TLS connections. It does their handshakes, a few at a
// time, and reports those that fail.
package handshake

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"reflect"
	"slices"
	"sync"
	"time"
)

// timeout bounds a handshake, with its wait for a turn.
const timeout = 10 * time.Second

// Failure is a handshake that failed.
type Failure struct {
	From string // HOST:PORT
	Err  error
	// Denied says that the client's certificate, or for the client ours, was not
	// accepted. Otherwise something did not work.
	Denied bool
}

// Silent reports whether the client disconnected without a word, as a probe of the port
// does.
func (f *Failure) Silent() bool { return errors.Is(f.Err, io.EOF) }

// Listener returns a listener of l's connections with TLS as conf configures it, once
// their handshake is complete. Failed is called for each other one, except while the
// listener is closed.
func (t *Turns) Listener(l net.Listener, conf *tls.Config, failed func(Failure)) net.Listener {
	ctx, cancel := context.WithCancel(context.Background())
	return &listener{Listener: l, conf: t.config(conf), turns: t, failed: failed, results: make(chan result), ctx: ctx, cancel: cancel}
}

type listener struct {
	net.Listener
	conf   *tls.Config
	turns  *Turns
	failed func(Failure)

	start   sync.Once
	results chan result
	ctx     context.Context // until it is closed
	cancel  context.CancelFunc
}

type result struct {
	conn net.Conn
	err  error
}

// Accept returns the next connection, a [*tls.Conn] whose handshake is complete.
func (l *listener) Accept() (net.Conn, error) {
	l.start.Do(func() { go l.run() })
	select {
	case r := <-l.results:
		return r.conn, r.err
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.cancel()
	return l.Listener.Close()
}

func (l *listener) run() {
	for {
		c, err := l.Listener.Accept()
		if err == nil {
			go l.handshake(&turn{Conn: c, turns: l.turns})
			continue
		}
		// The caller of Accept decides whether to go on, and when.
		if !l.deliver(result{err: err}) {
			return
		}
	}
}

// deliver reports whether Accept takes a result: it does until the listener is closed.
func (l *listener) deliver(r result) bool {
	select {
	case l.results <- r:
		return true
	case <-l.ctx.Done():
		return false
	}
}

func (l *listener) handshake(c *turn) {
	c.SetDeadline(time.Now().Add(timeout))
	conn := tls.Server(c, l.conf)
	err := l.do(conn)
	if err == nil {
		c.SetDeadline(time.Time{})
		if !l.deliver(result{conn: conn}) {
			conn.Close()
		}
		return
	}
	if refuseHTTP(err) {
		err = errHTTP
	}
	conn.Close()
	if l.ctx.Err() == nil {
		l.failed(Failure{c.RemoteAddr().String(), err, denied(err, c.answered.Load())})
	}
}

// do returns a panic as an error, as net/http does: strange certificates made crypto/x509
// panic before (CVE-2024-24783).
func (l *listener) do(conn *tls.Conn) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	return conn.HandshakeContext(l.ctx)
}

var errHTTP = errors.New("client sent an HTTP request to an HTTPS server")

// refuseHTTP answers a client that speaks HTTP without TLS, as net/http does.
func refuseHTTP(err error) bool {
	noTLS := new(tls.RecordHeaderError)
	if !errors.As(err, noTLS) || noTLS.Conn == nil || !slices.Contains([]string{"GET /", "HEAD ", "POST ", "PUT /", "OPTIO"}, string(noTLS.RecordHeader[:])) {
		return false
	}
	io.WriteString(noTLS.Conn, "HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n")
	return true
}

// denied reports whether a handshake failed over a certificate. Answered says that the
// client had ours, and was to show its own.
func denied(err error, answered bool) bool {
	if errors.As(err, new(*tls.CertificateVerificationError)) {
		return true
	}
	if alert, ok := alertOf(err); ok {
		return slices.Contains(certificateAlerts, alert)
	}
	if errors.As(err, new(net.Error)) || errors.As(err, new(tls.RecordHeaderError)) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, context.Canceled) {
		return false
	}
	// What else crypto/tls has to say after its answer is about what the client showed:
	// no certificate, or a signature that is not its key's.
	return answered
}

// certificateAlerts are the alerts about certificates: RFC 8446, section 6.2, and RFC
// 6066, section 9, from bad_certificate to unknown_ca, and certificate_required.
var certificateAlerts = []tls.AlertError{42, 43, 44, 45, 46, 48, 111, 113, 114, 116}

// alertOf returns the alert that the client or this side has sent. crypto/tls wraps it in a
// [net.OpError] as a type of its own, of the same kind as [tls.AlertError].
func alertOf(err error) (tls.AlertError, bool) {
	op := new(net.OpError)
	if !errors.As(err, &op) || op.Err == nil {
		return 0, false
	}
	if v := reflect.ValueOf(op.Err); v.Kind() == reflect.Uint8 {
		return tls.AlertError(v.Uint()), true
	}
	return 0, false
}

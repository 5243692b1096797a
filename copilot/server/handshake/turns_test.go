package server

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/certfile/certtest"
)

// TestTurns has clients wait for their turn, of which one gives up.
func TestTurns(t *testing.T) {
	ca := certtest.NewAuthority(t)
	pair := ca.Issue(t, x509.Certificate{})
	conf, err := certfile.Server(pair.Cert, pair.Key, nil, true)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := newHandshakes(prometheus.NewCounter(prometheus.CounterOpts{}))
	l = h.listener(l, conf)
	defer l.Close()
	for range cap(h.turns) {
		h.turns <- struct{}{} // all are taken
	}
	client := func() (net.Conn, chan error) {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		said := make(chan error, 1)
		go func() { said <- tls.Client(c, &tls.Config{InsecureSkipVerify: true}).Handshake() }()
		return c, said
	}
	server := func() chan error {
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- c.(*tls.Conn).Handshake() }()
		return done
	}
	impatient, _ := client()
	gone := server()
	_, said := client()
	done := server()
	select {
	case <-gone:
		t.Fatal("it had a turn")
	case <-done:
		t.Fatal("it had a turn")
	case <-time.After(200 * time.Millisecond):
	}
	impatient.Close()
	<-h.turns
	if err := <-gone; !errors.Is(err, errOverload) {
		t.Errorf("who gave up was worked on: %v", err)
	}
	if err := errors.Join(<-said, <-done); err != nil {
		t.Errorf("who waited: %v", err)
	}
	if len(h.turns) != cap(h.turns)-1 {
		t.Errorf("%d turns are taken", len(h.turns))
	}

	// Nobody is done in time.
	h.turns <- struct{}{}
	_, said = client()
	if err := <-server(); !errors.Is(err, errOverload) {
		t.Error(err)
	}
	if err := <-said; err == nil {
		t.Error("the client was answered")
	}
}

package handshake

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

// TestHandshakesWaitForTheirTurn has clients wait for their turn. One gives up.
func TestHandshakesWaitForTheirTurn(t *testing.T) {
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
	turns := NewTurns(prometheus.NewCounter(prometheus.CounterOpts{}))
	failures := make(chan Failure, 3)
	l = turns.Listener(l, conf, func(f Failure) { failures <- f })
	defer l.Close()
	accepted := make(chan net.Conn, 3)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	for range cap(turns.slots) {
		turns.slots <- struct{}{} // all are taken
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
	impatient, _ := client()
	time.Sleep(time.Second) // it is the first to wait
	_, said := client()
	select {
	case <-accepted:
		t.Fatal("it had a turn")
	case f := <-failures:
		t.Fatalf("it failed: %v", f.Err)
	case <-time.After(time.Second):
	}
	impatient.Close()
	<-turns.slots
	if f := <-failures; !errors.Is(f.Err, ErrOverload) || f.Denied {
		t.Errorf("the client that gave up had a turn: %+v", f)
	}
	if err := <-said; err != nil {
		t.Errorf("the client that waited: %v", err)
	}
	(<-accepted).Close()
	if len(turns.slots) != cap(turns.slots)-1 {
		t.Errorf("%d turns are taken", len(turns.slots))
	}

	// No turn ends in time.
	turns.slots <- struct{}{}
	_, said = client()
	if f := <-failures; !errors.Is(f.Err, ErrOverload) {
		t.Error(f.Err)
	}
	if err := <-said; err == nil {
		t.Error("the client was answered")
	}
}

package ratelimit

import (
	"errors"
	"net"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// pipe returns a counted connection.
func pipe(t *testing.T, all *Connections) *connection {
	t.Helper()
	c, other := net.Pipe()
	t.Cleanup(func() {
		c.Close()
		other.Close()
	})
	return all.opened(c)
}

// TestClosedConnectionIsNotCounted closes a connection before its first request is
// looked at, which HTTP/2 allows.
func TestClosedConnectionIsNotCounted(t *testing.T) {
	all := &Connections{Refused: prometheus.NewCounter(prometheus.CounterOpts{})}
	conn := pipe(t, all)
	ctx := OnConnection(t.Context(), conn)
	conn.Close()
	conn.Close()
	if err := Identified(ctx, "uid:0", 1); err != nil {
		t.Error(err)
	}
	if len(all.identified)+len(all.unidentified) > 0 {
		t.Errorf("counted: %v %v", all.identified, all.unidentified)
	}
}

func TestConnectionOverTheLimitIsRefused(t *testing.T) {
	all := &Connections{Refused: prometheus.NewCounter(prometheus.CounterOpts{})}
	first, second := pipe(t, all), pipe(t, all)
	if err := Identified(OnConnection(t.Context(), first), "uid:0", 1); err != nil {
		t.Fatal(err)
	}
	ctx := OnConnection(t.Context(), second)
	if err := Identified(ctx, "uid:0", 1); !errors.As(err, new(*Exceeded)) {
		t.Errorf("the second: %v", err)
	}
	first.Close()
	if err := Identified(ctx, "uid:0", 1); err != nil {
		t.Errorf("after the first was closed: %v", err)
	}
}

func TestUnidentifiedConnectionOverTheLimitIsClosed(t *testing.T) {
	all := &Connections{Refused: prometheus.NewCounter(prometheus.CounterOpts{})}
	from := pipe(t, all).from
	all.unidentified[from] = maxUnidentified
	if _, err := pipe(t, all).Read(make([]byte, 1)); !errors.Is(err, ErrUnidentified) {
		t.Errorf("read: %v", err)
	}
}

// from6 is a connection from an IPv6 address.
type from6 struct {
	net.Conn
	address string
}

func (c from6) RemoteAddr() net.Addr {
	return &net.TCPAddr{IP: net.ParseIP(c.address), Port: 1}
}

func TestUnidentifiedConnectionsOfANetworkCountAsOneAddress(t *testing.T) {
	all := &Connections{Refused: prometheus.NewCounter(prometheus.CounterOpts{})}
	open := func(address string) *connection {
		a, b := net.Pipe()
		t.Cleanup(func() {
			a.Close()
			b.Close()
		})
		return all.opened(from6{a, address})
	}
	first := open("2001:db8:1:2::3")
	all.unidentified[first.from] = maxUnidentified
	if !open("2001:db8:1:2:ffff::1").refused {
		t.Error("another address of the same machine is not refused")
	}
	if open("2001:db8:1:3::1").refused {
		t.Error("another network is refused")
	}
}

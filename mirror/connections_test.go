package mirror

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

// TestOldestStrangerMakesRoom has more connections than may be open.
func TestOldestStrangerMakesRoom(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := newListener(inner, 3)
	defer l.Close()
	connect := func() (client net.Conn, server *connection) {
		t.Helper()
		client, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { client.Close() })
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		return client, c.(*connection)
	}
	closedWithin := func(c net.Conn, wait time.Duration) bool {
		t.Helper()
		if err := c.SetReadDeadline(time.Now().Add(wait)); err != nil {
			t.Fatal(err)
		}
		_, err := c.Read(make([]byte, 1))
		return errors.Is(err, io.EOF)
	}
	isOpen := func(c net.Conn) bool { return !closedWithin(c, 50*time.Millisecond) }
	isClosed := func(c net.Conn) bool { return closedWithin(c, time.Minute) }
	first, caller := connect()
	caller.authenticated()
	second, _ := connect()
	third, _ := connect()
	fourth, _ := connect()
	if !isClosed(second) || !isOpen(first) || !isOpen(third) || !isOpen(fourth) {
		t.Error("not the oldest stranger has made room")
	}
	for range 100 {
		connect()
	}
	if !isOpen(first) || !isClosed(third) {
		t.Error("strangers have closed a caller's connection, or keep their own")
	}
	if n := l.strangers.Len(); n != 2 || len(l.room) != 3 {
		t.Errorf("%d strangers, %d connections", n, len(l.room))
	}
	// With callers only, a new one waits for one of them to go.
	for at := l.strangers.Front(); at != nil; at = l.strangers.Front() {
		at.Value.(*connection).authenticated()
	}
	late, err := net.Dial("tcp", inner.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer late.Close()
	accepted := make(chan net.Conn)
	go func() {
		c, err := l.Accept()
		if err != nil {
			t.Error(err)
		}
		accepted <- c
	}()
	select {
	case <-accepted:
		t.Error("one too many")
	case <-time.After(50 * time.Millisecond):
	}
	caller.Close()
	caller.Close() // it counts once
	if c := <-accepted; c != nil {
		c.Close()
	}
	if len(l.room) != 2 {
		t.Errorf("%d connections", len(l.room))
	}
}

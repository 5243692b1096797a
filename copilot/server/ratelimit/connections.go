package ratelimit

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ctrlplane/pilot/copilot/server/caller"
)

// maxUnidentified is how many connections may be open from one address, one /64 network
// of IPv6, or one user of a unix socket, before a request on them was authenticated. All
// nodes behind a NAT share one address.
const maxUnidentified = 4096

// ErrUnidentified is the error of reading from a connection that is one too many.
var ErrUnidentified = fmt.Errorf("too many connections from one address: %d are open without an authenticated request", maxUnidentified)

// Connections bounds how many connections each caller has open, so that no caller uses
// up all files and memory. It is safe for concurrent use.
type Connections struct {
	// Refused counts the refused ones.
	Refused prometheus.Counter

	mu           sync.Mutex
	unidentified map[string]int // by address or user
	identified   map[string]int // by identity
}

// Listener returns a listener of l's connections, which counts them. One too many is
// closed, and reading from it returns [ErrUnidentified].
func (all *Connections) Listener(l net.Listener) net.Listener { return listener{l, all} }

type listener struct {
	net.Listener
	all *Connections
}

func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.all.opened(c), nil
}

// connection is an open connection.
type connection struct {
	net.Conn
	all      *Connections
	from     string // until it is identified
	identity string // of the first request
	refused  bool
	closed   bool
}

func (all *Connections) opened(c net.Conn) *connection {
	conn := &connection{Conn: c, all: all, from: caller.UserOf(c)}
	if conn.from == "" {
		conn.from = caller.Network(c.RemoteAddr().String())
	}
	all.mu.Lock()
	defer all.mu.Unlock()
	if all.unidentified == nil {
		all.unidentified, all.identified = make(map[string]int), make(map[string]int)
	}
	if all.unidentified[conn.from] >= maxUnidentified {
		all.Refused.Inc()
		conn.refused, conn.closed = true, true
		c.Close()
		return conn
	}
	all.unidentified[conn.from]++
	return conn
}

// NetConn returns the connection that is counted.
func (c *connection) NetConn() net.Conn { return c.Conn }

func (c *connection) Read(b []byte) (int, error) {
	if c.refused {
		return 0, ErrUnidentified
	}
	return c.Conn.Read(b)
}

func (c *connection) Close() error {
	c.all.mu.Lock()
	if !c.closed {
		c.closed = true
		if c.identity != "" {
			decrement(c.all.identified, c.identity)
		} else {
			decrement(c.all.unidentified, c.from)
		}
	}
	c.all.mu.Unlock()
	return c.Conn.Close()
}

func decrement(m map[string]int, key string) {
	if m[key]--; m[key] <= 0 {
		delete(m, key)
	}
}

// connectionKey is the context key of a request's *connection.
type connectionKey struct{}

// OnConnection returns the context of a new connection's requests, for [Identified].
func OnConnection(ctx context.Context, c net.Conn) context.Context {
	for {
		if counted, ok := c.(*connection); ok {
			return context.WithValue(ctx, connectionKey{}, counted)
		}
		wrapper, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			return ctx
		}
		c = wrapper.NetConn()
	}
}

// Identified counts a request's connection as one of identity, from its first
// authenticated request on. The error is an [*Exceeded] if the identity has limit
// connections open already. Requests over connections that are not counted, as those of
// the admin socket, are never refused.
func Identified(ctx context.Context, identity string, limit int) error {
	c, ok := ctx.Value(connectionKey{}).(*connection)
	if !ok {
		return nil
	}
	c.all.mu.Lock()
	defer c.all.mu.Unlock()
	// An HTTP/2 request may outlive its connection, which is not counted any more.
	if c.identity != "" || c.closed {
		return nil
	}
	if c.all.identified[identity] >= limit {
		c.all.Refused.Inc()
		return &Exceeded{RetryAfter: time.Second, Connections: limit}
	}
	c.identity = identity
	c.all.identified[identity]++
	decrement(c.all.unidentified, c.from)
	return nil
}

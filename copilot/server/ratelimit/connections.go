package server

import (
	"context"
	"net"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// maxUnknown is how many connections are open at once from one address, or of one user
// of a unix socket, on which nobody has said yet who they are. All nodes behind a NAT
// come from one address.
const maxUnknown = 4096

// connections bounds how many connections each caller has open, so that no one takes
// all files and all memory. It is safe for concurrent use.
type connections struct {
	refused prometheus.Counter

	mu      sync.Mutex
	by      map[net.Conn]*connection
	unknown map[string]int // by address or user
	known   map[string]int // by identity
}

// connection is one that is open.
type connection struct {
	all      *connections
	from     string // while it is not known whose it is
	identity string // of the first request
	closed   bool
}

// connectionKey is the context key of a request's *connection.
type connectionKey struct{}

// opened notes a new connection, and closes it if it is one too many.
func (all *connections) opened(ctx context.Context, c net.Conn) context.Context {
	from := source(c.RemoteAddr().String())
	if peer := peerOf(ctx); peer != "" {
		from = peer
	}
	all.mu.Lock()
	defer all.mu.Unlock()
	if all.by == nil {
		all.by, all.unknown, all.known = make(map[net.Conn]*connection), make(map[string]int), make(map[string]int)
	}
	if all.unknown[from] >= maxUnknown {
		all.refused.Inc()
		c.Close()
		return ctx
	}
	all.unknown[from]++
	all.by[c] = &connection{all: all, from: from}
	return context.WithValue(ctx, connectionKey{}, all.by[c])
}

// closed notes that a connection was closed.
func (all *connections) closed(c net.Conn) {
	all.mu.Lock()
	defer all.mu.Unlock()
	conn, ok := all.by[c]
	if !ok {
		return
	}
	delete(all.by, c)
	conn.closed = true
	if conn.identity != "" {
		less(all.known, conn.identity)
	} else {
		less(all.unknown, conn.from)
	}
}

func less(m map[string]int, key string) {
	if m[key]--; m[key] <= 0 {
		delete(m, key)
	}
}

// of counts the connection for an identity, from its first request on. It returns an
// error if the identity has as many as it may.
func (c *connection) of(identity string, most int) error {
	if c == nil {
		return nil // on the admin socket, or in this process
	}
	c.all.mu.Lock()
	defer c.all.mu.Unlock()
	// Requests of HTTP/2 may outlive their connection, which is not counted any more.
	if c.identity != "" || c.closed {
		return nil
	}
	if c.all.known[identity] >= most {
		c.all.refused.Inc()
		return &tooMany{after: time.Second, connections: most}
	}
	c.identity = identity
	c.all.known[identity]++
	less(c.all.unknown, c.from)
	return nil
}

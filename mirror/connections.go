package mirror

import (
	"container/list"
	"context"
	"net"
	"sync"

	"github.com/ctrlplane/pilot/internal/certfile"
)

// maxConnections is how many connections a mirror has at once.
const maxConnections = 512

// Listener returns a listener of l's connections, of which at most 512 are open at once:
// when there are as many, a new one takes the place of the oldest over which nobody has
// authenticated yet. It goes below the listener for TLS, if there is one.
func Listener(l net.Listener) net.Listener { return newListener(l, maxConnections) }

type listener struct {
	net.Listener
	room   chan struct{} // has one for each connection
	closed chan struct{}
	once   sync.Once

	mu        sync.Mutex
	strangers list.List // of *connection, the oldest first
}

func newListener(l net.Listener, most int) *listener {
	return &listener{Listener: l, room: make(chan struct{}, most), closed: make(chan struct{})}
}

func (l *listener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	select {
	case l.room <- struct{}{}:
	default:
		l.closeOldest()
		select {
		case l.room <- struct{}{}:
		case <-l.closed:
			conn.Close()
			return nil, net.ErrClosed
		}
	}
	c := &connection{Conn: conn, listener: l}
	l.mu.Lock()
	defer l.mu.Unlock()
	c.stranger = l.strangers.PushBack(c)
	return c, nil
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

// closeOldest closes the oldest connection over which nobody has authenticated, if there is
// one.
func (l *listener) closeOldest() {
	l.mu.Lock()
	oldest := l.strangers.Front()
	l.mu.Unlock()
	if oldest != nil {
		oldest.Value.(*connection).Close()
	}
}

// connection is one of a [listener]'s.
type connection struct {
	net.Conn
	listener *listener
	closed   sync.Once
	stranger *list.Element // nil once somebody has authenticated
}

// authenticated notes that a caller has authenticated.
func (c *connection) authenticated() {
	c.listener.mu.Lock()
	defer c.listener.mu.Unlock()
	if c.stranger != nil {
		c.listener.strangers.Remove(c.stranger)
		c.stranger = nil
	}
}

func (c *connection) Close() error {
	err := c.Conn.Close()
	c.closed.Do(func() {
		c.authenticated() // it is none of those to close
		<-c.listener.room
	})
	return err
}

// session is what is known of a request's connection.
type session struct {
	certificate certfile.Verified
	connection  *connection // nil if a [Listener] has not accepted it
}

// sessionKey is the key in a request's context of its session.
type sessionKey struct{}

// OnConnection is for [http.Server.ConnContext]. Without it, callers have no certificate.
func OnConnection(ctx context.Context, c net.Conn) context.Context {
	s := &session{}
	for {
		if s.connection, _ = c.(*connection); s.connection != nil {
			break
		}
		outer, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		c = outer.NetConn()
	}
	return context.WithValue(ctx, sessionKey{}, s)
}

package server

import (
	"net"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// TestClosedConnectionIsNotCounted has a connection close before its first request
// is looked at, as HTTP/2 lets it.
func TestClosedConnectionIsNotCounted(t *testing.T) {
	all := &connections{refused: prometheus.NewCounter(prometheus.CounterOpts{})}
	c, other := net.Pipe()
	defer c.Close()
	defer other.Close()
	conn := all.opened(t.Context(), c).Value(connectionKey{}).(*connection)
	all.closed(c)
	if err := conn.of("uid:0", 1); err != nil {
		t.Error(err)
	}
	if len(all.known)+len(all.unknown)+len(all.by) > 0 {
		t.Errorf("counted: %v %v", all.known, all.unknown)
	}
}

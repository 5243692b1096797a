package mirror

import (
	"context"
	"net"
	"net/http"
	"strings"
)

// trustedKey is the key in a request's context of a connection that needs no credentials.
type trustedKey struct{}

func isTrusted(r *http.Request) bool { return r.Context().Value(trustedKey{}) != nil }

// LazyServer returns a server of parts of layers and of nothing else. Its callers need no
// credentials, so it is for a unix socket that only root may connect to. They are containerd's
// snapshotter, so they may name registries that containerd pulls from: any, also on loopback
// addresses.
func (m *Mirror) LazyServer() *http.Server {
	s := m.Server()
	s.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		return context.WithValue(OnConnection(ctx, c), trustedKey{}, true)
	}
	s.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.URL.Path, "/lazy/") {
			http.NotFound(w, r)
			return
		}
		m.ServeHTTP(w, r)
	})
	return s
}

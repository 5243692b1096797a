package copilot

import (
	"context"
	"fmt"
	"net"
	"net/http"

	"golang.org/x/sys/unix"
)

// peerKey is the context key of the unix credentials of a connection's peer.
type peerKey struct{}

// withPeer notes who is at the other end of a unix socket.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return ctx
	}
	raw.Control(func(fd uintptr) {
		if peer, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			ctx = context.WithValue(ctx, peerKey{}, peer)
		}
	})
	return ctx
}

// identity tells who makes a request: the SPIFFE ID, else the first DNS name,
// else the common name of a client's certificate; the user at the other end of
// a unix socket; else anonymous.
func identity(r *http.Request) string {
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		cert := r.TLS.PeerCertificates[0]
		for _, u := range cert.URIs {
			if u.Scheme == "spiffe" {
				return u.String()
			}
		}
		if len(cert.DNSNames) > 0 {
			return "dns:" + cert.DNSNames[0]
		}
		return "cn:" + cert.Subject.CommonName
	}
	if peer, ok := r.Context().Value(peerKey{}).(*unix.Ucred); ok {
		return fmt.Sprintf("uid:%d", peer.Uid)
	}
	return "anonymous"
}

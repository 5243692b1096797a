package copilot

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

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

// anonymous is whoever says nothing of who they are.
const anonymous = "anonymous"

// of tells who makes a request: whom a bearer token tells, else a
// client's certificate, else the user at the other end of a unix socket, else
// anonymous. A token that is not good is an error, whatever else there is.
func (all *issuers) of(r *http.Request) (string, error) {
	if header := r.Header.Get("Authorization"); header != "" {
		scheme, token, _ := strings.Cut(header, " ")
		if !strings.EqualFold(scheme, "Bearer") {
			return anonymous, fmt.Errorf("authorization by %.20q is not known here: it takes Bearer", scheme)
		}
		who, err := all.identity(r.Context(), strings.TrimSpace(token))
		if err != nil {
			return anonymous, err
		}
		return who, nil
	}
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		return certificateIdentity(r)
	}
	if peer, ok := r.Context().Value(peerKey{}).(*unix.Ucred); ok {
		return fmt.Sprintf("uid:%d", peer.Uid), nil
	}
	return anonymous, nil
}

// lastOfCertificate is how long before a client's certificate expires its
// connections end, so that one that was replaced in time is used in time: as
// long as a connection may be idle, and more.
const lastOfCertificate = 3 * time.Minute

// certificateEnds reports whether the client has to connect anew for its next
// request.
func certificateEnds(r *http.Request) bool {
	return r.TLS != nil && len(r.TLS.PeerCertificates) > 0 && time.Until(r.TLS.PeerCertificates[0].NotAfter) < lastOfCertificate
}

// certificateIdentity is the SPIFFE ID, else the first DNS name, else the
// common name.
func certificateIdentity(r *http.Request) (string, error) {
	cert := r.TLS.PeerCertificates[0]
	// The connection may be older than that.
	if now := time.Now(); now.After(cert.NotAfter) {
		return anonymous, fmt.Errorf("the certificate has expired on %s: put a new one in its place (\"copilot enroll\")", cert.NotAfter.Format(time.RFC3339))
	}
	spiffe := ""
	for _, u := range cert.URIs {
		if u.Scheme != "spiffe" {
			continue
		}
		if spiffe != "" {
			return anonymous, errors.New("the certificate has two SPIFFE IDs")
		}
		spiffe = u.String()
	}
	switch {
	case spiffe != "":
		return spiffe, nil
	case len(cert.DNSNames) > 0:
		return "dns:" + cert.DNSNames[0], nil
	case cert.Subject.CommonName != "":
		return "cn:" + cert.Subject.CommonName, nil
	}
	return anonymous, errors.New("the certificate names nobody: it has no SPIFFE ID, DNS name or common name")
}

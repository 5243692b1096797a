package server

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	"github.com/ctrlplane/pilot/copilot/policy"
	"github.com/ctrlplane/pilot/internal/certfile"
)

// Context keys: of the unix credentials of a connection's peer, and of what
// verifying its certificate came to.
type (
	peerKey     struct{}
	verifiedKey struct{}
)

// withPeer notes who is at the other end of a unix socket, and has room for who is
// at that of another connection.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	ctx = context.WithValue(ctx, verifiedKey{}, new(certfile.Verified))
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

// peerOf returns the identity of the user at the other end of a unix socket, or "".
func peerOf(ctx context.Context) string {
	if peer, ok := ctx.Value(peerKey{}).(*unix.Ucred); ok {
		return fmt.Sprintf("uid:%d", peer.Uid)
	}
	return ""
}

// anonymous is whoever says nothing of who they are.
const anonymous = "anonymous"

// identify returns who makes a request: whom a bearer token names, else a
// client's certificate, else the user at the other end of a unix socket, else
// anonymous. A token that is not good is an error, whatever else there is, and so is
// a certificate whose CA is no longer trusted.
func (b *broker) identify(r *http.Request) (string, error) {
	var chains [][]*x509.Certificate
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		if err := expired(r.TLS.PeerCertificates[0]); err != nil {
			return anonymous, err
		}
		v, ok := r.Context().Value(verifiedKey{}).(*certfile.Verified)
		if !ok || b.clients == nil {
			return anonymous, errors.New("the certificate was not verified")
		}
		var err error
		if chains, err = v.Verify(b.clients, r.TLS.PeerCertificates); err != nil {
			return anonymous, fmt.Errorf("the certificate is no longer good: get one from a CA that is in tls-client-ca now: %w", err)
		}
	}
	if header := r.Header.Get("Authorization"); header != "" {
		scheme, token, _ := strings.Cut(header, " ")
		if !strings.EqualFold(scheme, "Bearer") {
			return anonymous, fmt.Errorf("authorization by %.20q is not known here: it takes Bearer", scheme)
		}
		who, err := b.issuers.identity(r.Context(), strings.TrimSpace(token))
		if err != nil {
			return anonymous, err
		}
		return who, nil
	}
	if len(chains) > 0 {
		return certificateIdentity(r.TLS.PeerCertificates[0], chains)
	}
	if peer := peerOf(r.Context()); peer != "" {
		return peer, nil
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

// expired returns an error if a certificate has expired, since the connection was made.
func expired(cert *x509.Certificate) error {
	if !time.Now().After(cert.NotAfter) {
		return nil
	}
	return fmt.Errorf("the certificate has expired on %s: put a new one in its place (\"copilot certs renew\")", cert.NotAfter.Format(time.RFC3339))
}

// certificateIdentity is the SPIFFE ID, else the first DNS name, else the
// common name.
func certificateIdentity(cert *x509.Certificate, chains [][]*x509.Certificate) (string, error) {
	if cert.IsCA {
		return anonymous, errors.New("the certificate is a CA's, not a client's")
	}
	var id *url.URL
	for _, u := range cert.URIs {
		if !strings.EqualFold(u.Scheme, "spiffe") {
			continue
		}
		if id != nil {
			return anonymous, errors.New("the certificate has two SPIFFE IDs")
		}
		id = u
	}
	switch {
	case id != nil:
		return spiffeIdentity(id, chains)
	case len(cert.DNSNames) > 0:
		return policy.Canonical("dns:"+cert.DNSNames[0], nil)
	case cert.Subject.CommonName != "":
		return "cn:" + cert.Subject.CommonName, nil
	}
	return anonymous, errors.New("the certificate names nobody: it has no SPIFFE ID, DNS name or common name")
}

// spiffeIdentity checks a client's SPIFFE ID. A CA that has one itself, as those
// of "copilot init" and SPIRE do, issues those of its trust domain only.
func spiffeIdentity(u *url.URL, chains [][]*x509.Certificate) (string, error) {
	id, err := spiffeid.FromURI(u)
	if err == nil && id.Path() == "" {
		err = errors.New("it has no path, so it is a trust domain's, not a client's")
	}
	if err != nil {
		return anonymous, fmt.Errorf("the certificate's SPIFFE ID %q can't be used: %w", u, err)
	}
	var foreign error
	for _, chain := range chains {
		if foreign = boundTo(chain[len(chain)-1], id); foreign == nil {
			break
		}
	}
	if foreign != nil {
		return anonymous, foreign
	}
	return id.String(), nil
}

// boundTo returns an error if the CA is that of another trust domain.
func boundTo(ca *x509.Certificate, id spiffeid.ID) error {
	for _, u := range ca.URIs {
		if domain, err := spiffeid.TrustDomainFromURI(u); err == nil && domain != id.TrustDomain() {
			return fmt.Errorf("the certificate is for %s, and its CA for trust domain %s", id, domain.Name())
		}
	}
	return nil
}

// IsRevoked reports whether an identity is among those that a KEK was revoked for.
func IsRevoked(revoked []string, identity string) bool {
	return slices.ContainsFunc(revoked, func(r string) bool {
		// Earlier versions noted identities as they were spelled.
		if canonical, err := policy.Canonical(r, nil); err == nil {
			r = canonical
		}
		return r == identity
	})
}

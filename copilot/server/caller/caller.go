// Package caller answers who makes a request to the broker: the subject of a bearer
// token, the owner of a client certificate, or the user at the other end of a unix
// socket.
package caller

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/copilot/policy"
	"github.com/ctrlplane/pilot/internal/certfile"
)

// Anonymous is the identity of a caller that shows no credentials.
const Anonymous = "anonymous"

// ErrUnauthenticated is the error of a request without credentials that can be used.
var ErrUnauthenticated = errors.New("not authenticated")

// Authenticator authenticates requests. It is safe for concurrent use.
type Authenticator struct {
	// Clients are the CAs of client certificates, or nil if clients show none.
	Clients *certfile.Authorities
	Issuers *Issuers
	// AllowAnonymous accepts requests without credentials, as those of [Anonymous].
	AllowAnonymous bool
}

// Identify returns who makes a request: the subject of a bearer token, with its claims,
// else the owner of a client certificate, else the user at the other end of a unix
// socket, else [Anonymous]. A token that can't be used is an error, whatever else is
// shown, and so is a certificate whose CA is no longer trusted. Errors wrap
// [ErrUnauthenticated].
func (a *Authenticator) Identify(r *http.Request) (policy.Principal, error) {
	who, err := a.identify(r)
	if err == nil && who.Identity == Anonymous && !a.AllowAnonymous {
		err = errors.New("show a client certificate or a bearer token")
	}
	if err != nil {
		return policy.Principal{Identity: Anonymous}, fmt.Errorf("%w: %w", ErrUnauthenticated, err)
	}
	return who, nil
}

func (a *Authenticator) identify(r *http.Request) (who policy.Principal, err error) {
	var chains [][]*x509.Certificate
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		if chains, err = a.verify(r); err != nil {
			return who, err
		}
	}
	if header := r.Header.Get("Authorization"); header != "" {
		scheme, token, _ := strings.Cut(header, " ")
		if !strings.EqualFold(scheme, "Bearer") {
			return who, fmt.Errorf("the authorization scheme %.20q is not supported: use Bearer", scheme)
		}
		return a.Issuers.verify(r.Context(), strings.TrimSpace(token), r.RemoteAddr)
	}
	who.Identity = Anonymous
	if len(chains) > 0 {
		who.Identity, err = certificateIdentity(r.TLS.PeerCertificates[0], chains)
	} else if user := User(r.Context()); user != "" {
		who.Identity = user
	}
	return who, err
}

// verify verifies the certificate of a request by the CAs that are trusted now.
func (a *Authenticator) verify(r *http.Request) ([][]*x509.Certificate, error) {
	if cert := r.TLS.PeerCertificates[0]; time.Now().After(cert.NotAfter) { // since the handshake
		return nil, fmt.Errorf("the certificate expired on %s: replace it (\"copilot certs renew\")", cert.NotAfter.Format(time.RFC3339))
	}
	v, ok := r.Context().Value(verifiedKey{}).(*certfile.Verified)
	if !ok || a.Clients == nil {
		return nil, errors.New("the certificate was not verified")
	}
	chains, err := v.Verify(a.Clients, r.TLS.PeerCertificates)
	if err != nil {
		return nil, fmt.Errorf("the certificate is no longer trusted: get one from a CA that is in tls-client-ca now: %w", err)
	}
	return chains, nil
}

// lastOfCertificate is how long before a client's certificate expires its connections
// end, so that a replaced certificate is used in time: longer than a connection may be
// idle.
const lastOfCertificate = 3 * time.Minute

// CertificateEnds reports whether the client has to connect again for its next request,
// since its certificate is about to expire.
func CertificateEnds(r *http.Request) bool {
	return r.TLS != nil && len(r.TLS.PeerCertificates) > 0 && time.Until(r.TLS.PeerCertificates[0].NotAfter) < lastOfCertificate
}

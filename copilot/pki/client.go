package pki

import (
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/internal/certfile"
)

// Errors of [CA.RenewClient].
var (
	// ErrRequest: the certificate signing request can't be used.
	ErrRequest = errors.New("bad certificate signing request")
	// ErrNotRenewable: the certificate is not one that the CA renews.
	ErrNotRenewable = errors.New("the certificate can't be renewed here")
)

// RenewClient returns a certificate for the SPIFFE ID in a client's certificate, and
// for the key of a certificate signing request in PEM, which must not ask for
// anything. It is valid for as long as the one before, or until the CA expires if
// that is earlier.
//
// The certificate before must be valid, and have been issued by this CA, or by one that
// copilot made for the same trust domain and that is in trusted, a file in PEM. This CA
// must be there too, or no broker would accept the new certificate.
func (ca *CA) RenewClient(old *x509.Certificate, trusted string, request []byte) (*x509.Certificate, error) {
	csr, err := parseRequest(request)
	if err == nil && (len(csr.Subject.Names) > 0 || len(csr.Extensions) > 0) {
		err = errors.New("it asks for names or extensions: the certificate gets those of the one before, so make the request with an empty subject (openssl req -new -subj /)")
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	accepted, err := ca.Accepted(trusted)
	if err != nil {
		return nil, err
	}
	of := &CA{cert: ca.cert, file: accepted}
	if slices.Contains(old.ExtKeyUsage, x509.ExtKeyUsageServerAuth) {
		err = errors.New("it is a server's")
	} else {
		err = of.renewable(old)
	}
	now := time.Now()
	if err == nil && (now.Before(old.NotBefore) || now.After(old.NotAfter)) {
		err = fmt.Errorf("it is valid from %s until %s", old.NotBefore.Format(time.RFC3339), old.NotAfter.Format(time.RFC3339))
	}
	hold := old.NotAfter.Sub(old.NotBefore) - Backdate
	if left := ca.cert.NotAfter.Sub(now).Truncate(time.Second); err == nil && hold > left {
		if hold = left; !ca.cert.NotAfter.After(old.NotAfter) {
			err = fmt.Errorf("its CA expires on %s: replace the CA first (\"copilot certs rotate-ca\")", ca.cert.NotAfter.Format(time.RFC3339))
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotRenewable, err)
	}
	der, err := ca.client(Client{Path: strings.TrimPrefix(old.URIs[0].Path, "/"), Hold: hold}, csr.PublicKey)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// Accepted returns the CAs in a file in PEM whose clients may have their certificates
// renewed by this CA. That it is not in the file itself is an error.
func (ca *CA) Accepted(file string) ([]*x509.Certificate, error) {
	all, err := certfile.Certificates(file)
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(all, ca.cert.Equal) {
		return nil, fmt.Errorf("the CA %q is not in %s, so the certificates that it issues would not be accepted: add it", ca.cert.Subject.CommonName, file)
	}
	return slices.DeleteFunc(all, func(c *x509.Certificate) bool {
		name := c.Subject.CommonName
		// Another CA, such as SPIRE's, renews its own certificates.
		return !c.Equal(ca.cert) && name != caName+ca.TrustDomain() && name != nodeCAName+ca.TrustDomain()
	}), nil
}

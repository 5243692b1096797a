package caller

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ctrlplane/pilot/copilot/policy"
)

// certificateIdentity returns the SPIFFE ID of a client's certificate, else dns: and its
// first DNS name, else cn: and its common name.
func certificateIdentity(cert *x509.Certificate, chains [][]*x509.Certificate) (string, error) {
	if cert.IsCA {
		return "", errors.New("the certificate is a CA's, not a client's")
	}
	var id *url.URL
	for _, u := range cert.URIs {
		if !strings.EqualFold(u.Scheme, "spiffe") {
			continue
		}
		if id != nil {
			return "", errors.New("the certificate has two SPIFFE IDs")
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
	return "", errors.New("the certificate names nobody: it has no SPIFFE ID, DNS name or common name")
}

// spiffeIdentity checks a client's SPIFFE ID. A CA that has one itself, such as those of
// "copilot init" and SPIRE, issues certificates for its own trust domain only.
func spiffeIdentity(u *url.URL, chains [][]*x509.Certificate) (string, error) {
	id, err := spiffeid.FromURI(u)
	if err == nil && id.Path() == "" {
		err = errors.New("it has no path, so it is a trust domain's, not a client's")
	}
	if err != nil {
		return "", fmt.Errorf("the certificate's SPIFFE ID %q can't be used: %w", u, err)
	}
	var foreign error
	for _, chain := range chains {
		if foreign = checkTrustDomain(chain[len(chain)-1], id); foreign == nil {
			break
		}
	}
	if foreign != nil {
		return "", foreign
	}
	return id.String(), nil
}

// checkTrustDomain returns an error if the CA belongs to another trust domain.
func checkTrustDomain(ca *x509.Certificate, id spiffeid.ID) error {
	for _, u := range ca.URIs {
		if domain, err := spiffeid.TrustDomainFromURI(u); err == nil && domain != id.TrustDomain() {
			return fmt.Errorf("the certificate is for %s, and its CA for trust domain %s", id, domain.Name())
		}
	}
	return nil
}

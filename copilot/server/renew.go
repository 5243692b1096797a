package server

import (
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/pki"
)

// maxRequest bounds a certificate signing request, in bytes. One for an RSA key of
// 8192 bits has some 3,000.
const maxRequest = 16 << 10

// Each identity may have its certificate renewed so often.
const (
	renewInterval = time.Minute
	renewBurst    = 3
)

var errNoNodeCA = errors.New("this broker renews no certificates, since it has no node-ca: run \"copilot certs renew\" on its machine with a copy of the certificate, or see \"Renew by themselves\" in docs/copilot.md")

// notRenewed is the error of a client whose certificate is not renewed.
type notRenewed struct {
	reason string // for the audit log only
}

func (*notRenewed) Error() string {
	return "this certificate is not renewed: the audit log of the broker says why; \"copilot certs renew\" on its machine renews it all the same"
}

// renewed is the answer to a client whose certificate was renewed.
type renewed struct {
	Certificate string    `json:"certificate"` // in PEM
	NotAfter    time.Time `json:"notAfter"`
}

// renew issues a client another certificate for the same identity and for the key of
// its request, as long as that identity may use a KEK. No KEK may be revoked for it:
// an identity that was suspected once does not get certificates without end.
func (a *api) renew(r *http.Request, e *entry) (any, error) {
	if a.nodeCA == nil {
		return nil, errNoNodeCA
	}
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 || r.Header.Get("Authorization") != "" {
		return nil, fmt.Errorf("%w: a certificate is renewed for who shows it in the TLS handshake, and no token besides", keystore.ErrInput)
	}
	old := r.TLS.PeerCertificates[0]
	if !strings.HasPrefix(e.Who, "spiffe://") {
		return nil, &notRenewed{"the certificate has no SPIFFE ID"}
	}
	if after := a.renewals.takeAt(e.Who, 1/renewInterval.Seconds(), renewBurst); after > 0 {
		return nil, &tooMany{after: after}
	}
	if err := a.mayRenew(r, e); err != nil {
		return nil, err
	}
	var in struct {
		CSR string `json:"csr"`
	}
	if err := decodeBody(r, &in); err != nil {
		return nil, err
	}
	if len(in.CSR) > maxRequest {
		return nil, fmt.Errorf("%w: csr has %d bytes, and at most %d are possible", keystore.ErrInput, len(in.CSR), maxRequest)
	}
	ca, err := a.nodeCA.load()
	if err != nil {
		return nil, err
	}
	cert, err := ca.RenewClient(old, a.nodeCA.trusted, []byte(in.CSR))
	switch {
	case errors.Is(err, pki.ErrRequest):
		return nil, fmt.Errorf("%w: %w", keystore.ErrInput, err)
	case errors.Is(err, pki.ErrNotRenewable):
		return nil, &notRenewed{err.Error()}
	case err != nil:
		return nil, err
	}
	e.Reason = fmt.Sprintf("certificate %x instead of %x, until %s", cert.SerialNumber, old.SerialNumber, cert.NotAfter.UTC().Format(time.RFC3339))
	return renewed{string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})), cert.NotAfter.UTC()}, nil
}

// mayRenew returns an error unless an identity is a machine's that may use KEKs.
func (a *api) mayRenew(r *http.Request, e *entry) error {
	// All of them: a KEK that was revoked for it may be one that the policy does not
	// let it use any more.
	all, err := a.keks.list(r.Context(), func(string) bool { return true })
	if err != nil {
		return err
	}
	may, now := false, time.Now()
	p := a.policy.Policy()
	if p.Admins(e.Who, now) { // also KEKs that are still to be made
		return &notRenewed{e.Who + " may admin KEKs: an admin's certificate is renewed on the broker's machine"}
	}
	usable := p.Usable(e.Who, now)
	for _, k := range all {
		if IsRevoked(k.Revoked, e.Who) {
			return &notRenewed{fmt.Sprintf("the KEK %s was revoked for %s", k.ID, e.Who)}
		}
		may = may || usable(k.ID)
	}
	if !may {
		return &notRenewed{"the policy lets " + e.Who + " use no KEK"}
	}
	return nil
}

// nodeCA is where the CA is that clients' certificates are renewed with. Its files
// are read for each, so that it can be replaced.
type nodeCA struct {
	certFile, keyFile string
	trusted           string // tls-client-ca
}

// newNodeCA returns the CA that the configuration names, or nil if it names none.
func newNodeCA(conf Config) (*nodeCA, error) {
	if conf.NodeCA == "" {
		return nil, nil
	}
	n := &nodeCA{conf.NodeCA, conf.NodeCAKey, conf.TLSClientCA}
	ca, err := n.load()
	if err == nil {
		_, err = ca.Accepted(n.trusted)
	}
	if err != nil {
		return nil, fmt.Errorf("node-ca: %w", err)
	}
	return n, nil
}

func (n *nodeCA) load() (*pki.CA, error) {
	info, err := os.Stat(n.keyFile)
	if err != nil {
		return nil, err
	}
	if mode := info.Mode().Perm(); mode&0o027 != 0 {
		return nil, fmt.Errorf("%s can be read by others (mode %04o): chmod 0600 it, and if others could have read it, make a new CA (\"copilot certs node-ca\")", n.keyFile, mode)
	}
	ca, err := pki.LoadFiles(n.certFile, n.keyFile)
	if err == nil && ca.TrustDomain() == "" {
		err = fmt.Errorf("the CA in %s has no SPIFFE ID, so it has no trust domain to renew certificates for", n.certFile)
	}
	return ca, err
}

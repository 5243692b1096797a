package server

import (
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/pki"
	"github.com/ctrlplane/pilot/copilot/server/auditing"
	"github.com/ctrlplane/pilot/copilot/server/authorization"
)

// maxRequest bounds a certificate signing request, in bytes. One for an RSA key of
// 8192 bits has some 3,000.
const maxRequest = 16 << 10

// Limit of renewals of each identity.
const (
	renewInterval = time.Minute
	renewBurst    = 3
)

var errNoNodeCA = errors.New("this broker does not renew certificates, since node-ca is not set: run \"copilot certs renew\" on its machine with a copy of the certificate, or see \"Renew by themselves\" in docs/copilot.md")

// renewed is the answer to a client whose certificate was renewed.
type renewed struct {
	Certificate string    `json:"certificate"` // in PEM
	NotAfter    time.Time `json:"notAfter"`
}

// renew issues a client another certificate for the same identity and for the key of its
// request, as long as that identity may use a KEK. No KEK may be revoked for it: an
// identity that was suspected once must not get certificates forever.
func (a *api) renew(r *http.Request, e *auditing.Entry) (any, error) {
	if a.nodeCA == nil {
		return nil, errNoNodeCA
	}
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 || r.Header.Get("Authorization") != "" {
		return nil, fmt.Errorf("%w: a certificate is renewed for clients that show it in the TLS handshake, and no token", keystore.ErrInput)
	}
	old := r.TLS.PeerCertificates[0]
	if !strings.HasPrefix(e.Who, "spiffe://") {
		return nil, &authorization.NotRenewed{Reason: "the certificate has no SPIFFE ID"}
	}
	if err := a.renewals.TakeAt(e.Who, 1/renewInterval.Seconds(), renewBurst); err != nil {
		return nil, err
	}
	// A record that was put back, deleted or damaged may have had a revocation.
	keks, bad, err := a.keks.Store.ListChecked(r.Context(), a.least)
	if err != nil {
		return nil, err
	}
	if len(bad) > 0 {
		name := slices.Min(slices.Collect(maps.Keys(bad)))
		return nil, &authorization.NotRenewed{Reason: fmt.Sprintf("whether a KEK was revoked for %s is not known: %s: %s", e.Who, name, bad[name])}
	}
	for id := range a.conf.KEKs { // which need no record
		keks = append(keks, keystore.KEK{ID: id})
	}
	if err := authorization.CheckRenewal(a.policy.Policy(), e.Who, keks); err != nil {
		return nil, err
	}
	var in struct {
		CSR string `json:"csr"`
	}
	if err := decodeBody(r, &in); err != nil {
		return nil, err
	}
	if len(in.CSR) > maxRequest {
		return nil, fmt.Errorf("%w: csr has %d bytes, and the limit is %d", keystore.ErrInput, len(in.CSR), maxRequest)
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
		return nil, &authorization.NotRenewed{Reason: err.Error()}
	case err != nil:
		return nil, err
	}
	e.Reason = fmt.Sprintf("certificate %x instead of %x, until %s", cert.SerialNumber, old.SerialNumber, cert.NotAfter.UTC().Format(time.RFC3339))
	return renewed{string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})), cert.NotAfter.UTC()}, nil
}

// nodeCA is the CA that renews clients' certificates. Its files are read for each
// renewal, so that it can be replaced.
type nodeCA struct {
	certFile, keyFile string
	trusted           string // tls-client-ca
}

// newNodeCA returns the configured CA, or nil if there is none.
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
		return nil, fmt.Errorf("%s is readable by others (mode %04o): chmod 0600 it, and if others may have read it, create a new CA (\"copilot certs node-ca\")", n.keyFile, mode)
	}
	ca, err := pki.LoadFiles(n.certFile, n.keyFile)
	if err == nil && ca.TrustDomain() == "" {
		err = fmt.Errorf("the CA in %s has no SPIFFE ID, so it has no trust domain to renew certificates for", n.certFile)
	}
	return ca, err
}

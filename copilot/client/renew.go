package client

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/keyjson"
)

// RenewCertificate makes a new private key, has a broker issue a certificate for it in
// place of the client's, which must still be valid, and replaces the files of both.
// They keep their owner and mode. The private key stays on this machine. What the
// brokers do not accept replaces nothing.
//
// It returns the new certificate. New connections are made with it.
func (c *Client) RenewCertificate(ctx context.Context) (*x509.Certificate, error) {
	if c.certFile == "" {
		return nil, errors.New("there is no broker-cert to renew")
	}
	if c.original {
		return nil, errors.New("the original's API can't renew certificates")
	}
	if err := writable(c.certFile, c.keyFile); err != nil {
		return nil, err
	}
	if err := certfile.CompletePair(c.certFile, c.keyFile); err != nil {
		return nil, fmt.Errorf("broker-cert: %w", err)
	}
	pair, err := certfile.Load(c.certFile, c.keyFile)
	if err != nil {
		return nil, fmt.Errorf("broker-cert: %w", err)
	}
	old := pair.Certificate().Leaf
	if err := checkTime(old); err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	cert, err := c.renewed(ctx, old, key)
	if err != nil {
		return nil, err
	}
	if err := c.tryCertificate(ctx, tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}); err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	defer clear(keyDER)
	err = certfile.ReplacePair(c.certFile, c.keyFile,
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}))
	if err != nil {
		return nil, err
	}
	c.CloseIdleConnections()
	return cert, nil
}

// renewed returns the certificate that a broker issues for a key in place of another.
func (c *Client) renewed(ctx context.Context, old *x509.Certificate, key *ecdsa.PrivateKey) (cert *x509.Certificate, err error) {
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, err
	}
	body, err := json.Marshal(map[string]string{"csr": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr}))})
	if err != nil {
		return nil, err
	}
	r := request{name: "renew", method: http.MethodPost, path: []string{"api", "v2", "certificate", "renew"}, body: keyjson.NewBody(body), byCertificate: true}
	err = c.ask(ctx, r, func(answer []byte) error {
		var a struct {
			Certificate string `json:"certificate"`
		}
		if err := decode(answer, &a); err != nil {
			return err
		}
		block, rest := pem.Decode([]byte(a.Certificate))
		if block == nil || block.Type != "CERTIFICATE" || len(rest) > 0 {
			return fmt.Errorf("%w: it answered with no certificate in PEM", ErrUnavailable)
		}
		if cert, err = x509.ParseCertificate(block.Bytes); err == nil {
			err = inPlaceOf(old, cert, key)
		}
		if err != nil {
			return fmt.Errorf("%w: the certificate that it issued can't be used: %w", ErrUnavailable, err)
		}
		return nil
	})
	if errors.Is(err, errNoSuchPath) {
		err = fmt.Errorf("the broker's version can't renew certificates: run \"copilot certs renew\" on its machine: %w", err)
	}
	if err != nil {
		return nil, fmt.Errorf("renew %s: %w", c.certFile, err)
	}
	return cert, nil
}

// inPlaceOf returns an error if a certificate is not for the same as another, and for
// that key.
func inPlaceOf(old, cert *x509.Certificate, key *ecdsa.PrivateKey) error {
	uris := func(c *x509.Certificate) (all []string) {
		for _, u := range c.URIs {
			all = append(all, u.String())
		}
		return all
	}
	switch {
	case !key.PublicKey.Equal(cert.PublicKey):
		return errors.New("it is for another key")
	case cert.IsCA, !slices.Equal(uris(cert), uris(old)), len(cert.DNSNames)+len(cert.IPAddresses)+len(cert.EmailAddresses) > 0:
		return errors.New("it is for another name")
	case cert.NotAfter.Before(old.NotAfter):
		return fmt.Errorf("it expires on %s, before the current one", cert.NotAfter.Format(time.RFC3339))
	}
	return checkTime(cert)
}

// tryCertificate connects to each broker with a certificate. One that rejects it is an
// error, and so is it if none answers.
func (c *Client) tryCertificate(ctx context.Context, pair tls.Certificate) error {
	var away error
	accepted := false
	for _, b := range c.brokers {
		if b.base.Scheme != "https" {
			continue
		}
		t := b.http.Transport.(*http.Transport).Clone()
		t.TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
		client := *b.http
		client.Transport = t
		_, err := (&endpoint{url: b.url, base: b.base, http: &client}).probe(ctx)
		t.CloseIdleConnections()
		switch {
		case err == nil:
			accepted = true
		case errors.Is(permanent(err, true), ErrCertRejected):
			return fmt.Errorf("%s does not accept the new certificate, so the current one stays: is the CA that issued it in the broker's tls-client-ca? %w", b, err)
		default:
			away = fmt.Errorf("%s: %w: the new certificate was not tried: %w", b, ErrUnavailable, err)
		}
	}
	if !accepted {
		return away
	}
	return nil
}

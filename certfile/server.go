package certfile

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"sync"

	"github.com/sirupsen/logrus"
)

// Server returns TLS for a server that shows the pair of certFile and keyFile.
// Clients need a certificate from a CA in caFile; if optional is true, they may
// have none. The files are read again for each connection, so that all three
// can be replaced. An empty caFile, with optional, accepts no certificate.
func Server(certFile, keyFile, caFile string, optional bool) (*tls.Config, error) {
	pair, err := Load(certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	conf := tls.Config{
		MinVersion: tls.VersionTLS12,
		ClientAuth: tls.RequireAndVerifyClientCert,
		NextProtos: []string{"h2", "http/1.1"},
		// A session that goes on would go on past a change of the CA.
		SessionTicketsDisabled: true,
	}
	if optional {
		conf.ClientAuth = tls.VerifyClientCertIfGiven
	}
	if caFile == "" && optional {
		conf.ClientAuth = tls.NoClientCert
	} else if conf.ClientCAs, err = Pool(caFile); err != nil {
		return nil, fmt.Errorf("CA of the clients: %w", err)
	}
	var mu sync.Mutex
	last := conf.ClientCAs
	authorities := func() *x509.CertPool {
		mu.Lock()
		defer mu.Unlock()
		pool, err := Pool(caFile)
		if err != nil {
			logrus.WithError(err).WithField("ca", caFile).Warn("CA not read again: the one before is used")
			return last
		}
		last = pool
		return pool
	}
	return &tls.Config{MinVersion: tls.VersionTLS12, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		fresh := conf.Clone()
		fresh.Certificates = []tls.Certificate{*pair.Certificate()}
		if fresh.ClientAuth != tls.NoClientCert {
			fresh.ClientCAs = authorities()
		}
		return fresh, nil
	}}, nil
}

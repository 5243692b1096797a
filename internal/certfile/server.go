package certfile

import (
	"crypto/tls"
	"errors"
	"fmt"
)

// Server returns TLS for a server that shows the pair of certFile and keyFile.
// Clients need a certificate from one of the authorities; if optional is true, they
// may have none. Files that have changed are read again at the next connection, so that
// all three can be replaced. Clients may be nil if optional is true: then no certificate
// is accepted.
func Server(certFile, keyFile string, clients *Authorities, optional bool) (*tls.Config, error) {
	pair, err := Load(certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	return ServerOf(pair.Certificate, clients, optional)
}

// ServerOf is [Server] with the certificate that shown returns for each connection.
func ServerOf(shown func() *tls.Certificate, clients *Authorities, optional bool) (*tls.Config, error) {
	conf := tls.Config{
		MinVersion: tls.VersionTLS12,
		ClientAuth: tls.RequireAndVerifyClientCert,
		NextProtos: []string{"h2", "http/1.1"},
		// A session that goes on would go on past a change of the CA.
		SessionTicketsDisabled: true,
	}
	switch {
	case clients == nil && !optional:
		return nil, errors.New("the CA of the clients is not set")
	case clients == nil:
		conf.ClientAuth = tls.NoClientCert
	case optional:
		conf.ClientAuth = tls.VerifyClientCertIfGiven
	}
	return &tls.Config{MinVersion: tls.VersionTLS12, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		fresh := conf.Clone()
		fresh.Certificates = []tls.Certificate{*shown()}
		if clients != nil {
			fresh.ClientCAs = clients.Pool()
		}
		return fresh, nil
	}}, nil
}

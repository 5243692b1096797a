package certfile

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"

	"github.com/ctrlplane/pilot/internal/regular"
)

// Certificates returns the certificates in a PEM file, in their order. That there is
// none is an error.
func Certificates(file string) (certs []*x509.Certificate, err error) {
	b, err := regular.Read(file, regular.MaxConfig)
	if err != nil {
		return nil, err
	}
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, fmt.Errorf("%s holds no certificate", file)
	}
	return certs, nil
}

package certfile

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/ctrlplane/pilot/internal/regular"
)

// ErrNoCertificate is the error of a file that can be read and holds no certificate.
var ErrNoCertificate = errors.New("holds no certificate")

// Certificates returns the certificates in a PEM file, in their order. If there is none,
// the error wraps [ErrNoCertificate].
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
		return nil, fmt.Errorf("%s %w", file, ErrNoCertificate)
	}
	return certs, nil
}

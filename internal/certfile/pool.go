package certfile

import (
	"crypto/x509"
	"fmt"

	"github.com/ctrlplane/pilot/internal/regular"
)

// Pool returns the certificates in a PEM file as those that are trusted. That
// there is none is an error.
func Pool(file string) (*x509.CertPool, error) {
	pem, err := regular.Read(file, regular.MaxConfig)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s %w", file, ErrNoCertificate)
	}
	return pool, nil
}

package harness

import (
	"crypto/x509"
	"testing"

	"github.com/ctrlplane/pilot/copilot/pki"
)

func Certificate(t testing.TB, name string) *x509.Certificate {
	t.Helper()
	cert, err := pki.ReadCertificate(name)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

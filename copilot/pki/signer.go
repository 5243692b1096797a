package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/ctrlplane/pilot/internal/publickek"
)

// The files of the certificate that signs the public halves of KEKs, beside those of the
// CA. It has a key of its own, so that the CA's can be kept elsewhere.
const (
	SignerCertFile = "public-keys.pem"
	SignerKeyFile  = "public-keys-key.pem"
)

// IssueSigner writes a new private key and its certificate, which signs public halves of
// KEKs and nothing else, into files in dir that must not exist. The private key's file is
// passed to own while it is open, unless own is nil.
func (ca *CA) IssueSigner(dir string, valid time.Duration, own func(*os.File) error) error {
	domain := ca.TrustDomain()
	if domain == "" {
		return errors.New("the CA has no trust domain: it was not made by copilot init")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := sign(&x509.Certificate{
		Subject:            pkix.Name{CommonName: "copilot public keys"},
		URIs:               []*url.URL{publickek.SignerID(domain)},
		KeyUsage:           x509.KeyUsageDigitalSignature,
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{publickek.SignerUsage},
	}, ca.cert, key.Public(), ca.key, valid)
	if err != nil {
		return err
	}
	return writePair(filepath.Join(dir, SignerCertFile), der, filepath.Join(dir, SignerKeyFile), key, own)
}

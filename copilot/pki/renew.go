package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/ctrlplane/pilot/internal/publickek"
	"github.com/ctrlplane/pilot/internal/regular"
	"github.com/ctrlplane/pilot/internal/replacefile"
)

// Renew replaces a certificate that the CA has issued, or one before it that is still
// in its file, by one for the same name, usage and key. Any other is an error: the
// caller may have forged it. The new one is valid for the time given, or for as long as
// the one before if that is 0. The file keeps its owner and mode, and is replaced as a
// whole.
//
// If keyFile is not empty, a new private key replaces the one in that file, too.
// Programs that read the pair between the two replacements find that they do not match,
// and must keep their old pair.
//
// It returns the new certificate.
func (ca *CA) Renew(certFile, keyFile string, valid time.Duration) (*x509.Certificate, error) {
	old, err := ReadCertificate(certFile)
	if err != nil {
		return nil, err
	}
	if err := ca.renewable(old); err != nil {
		return nil, fmt.Errorf("%s: %w", certFile, err)
	}
	if err := onlyCertificate(certFile); err != nil {
		return nil, err
	}
	public := old.PublicKey
	var key *ecdsa.PrivateKey
	if keyFile != "" {
		if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			return nil, err
		}
		public = key.Public()
	}
	der, err := ca.again(old, public, valid)
	if err != nil {
		return nil, err
	}
	newCert, err := replacefile.Prepare(certFile, encode("CERTIFICATE", der))
	if err != nil {
		return nil, err
	}
	defer newCert.Discard()
	if key != nil {
		keyDER, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, err
		}
		defer clear(keyDER)
		newKey, err := replacefile.Prepare(keyFile, encode("PRIVATE KEY", keyDER))
		if err != nil {
			return nil, err
		}
		defer newKey.Discard()
		if err := newKey.Commit(); err != nil {
			return nil, err
		}
	}
	if err := newCert.Commit(); err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// renewable refuses certificates that this CA would not have issued.
func (ca *CA) renewable(old *x509.Certificate) error {
	switch {
	case old.IsCA:
		return errors.New("it is a CA's certificate: see \"Replace the CA\" in docs/copilot.md")
	case slices.Contains(old.ExtKeyUsage, x509.ExtKeyUsageServerAuth):
		if len(old.URIs)+len(old.EmailAddresses) > 0 {
			return errors.New("it was not issued by copilot")
		}
		return ca.issued(old, ca.replaced())
	case publickek.IsSigner(old):
		if old.URIs[0].Host != ca.TrustDomain() {
			return fmt.Errorf("it is for %s, and the CA's trust domain is %s", old.URIs[0], ca.TrustDomain())
		}
		return ca.issued(old, ca.replaced())
	case len(old.UnknownExtKeyUsage) > 0:
		return errors.New("it was not issued by copilot: it has a key usage that copilot does not know")
	case len(old.URIs) != 1 || len(old.DNSNames)+len(old.IPAddresses)+len(old.EmailAddresses) > 0:
		return errors.New("it was not issued by copilot: it has no SPIFFE ID, or other names besides")
	}
	id := old.URIs[0]
	if len(id.Path) < 2 {
		return fmt.Errorf("%s is not a client's SPIFFE ID", id)
	}
	again, err := ca.ID(id.Path[1:])
	if err != nil {
		return err
	}
	if again.String() != id.String() {
		return fmt.Errorf("it is for %s, and the CA's trust domain is %s", id, ca.TrustDomain())
	}
	return ca.issued(old, ca.siblings())
}

// issued returns an error unless the certificate's signature is that of the CA, or of
// one of others.
func (ca *CA) issued(cert *x509.Certificate, others []*x509.Certificate) error {
	for _, c := range append([]*x509.Certificate{ca.cert}, others...) {
		if cert.CheckSignatureFrom(c) == nil {
			return nil
		}
	}
	return fmt.Errorf("it was not issued by this CA, nor by one before it that is in %s: issue a new one with \"copilot enroll\"", CertFile)
}

// siblings returns the other CAs in the CA's file whose clients are its own: those of
// its trust domain. Those of other trust domains must not name clients of this one.
func (ca *CA) siblings() (list []*x509.Certificate) {
	for _, c := range ca.file {
		if !c.Equal(ca.cert) && trustDomain(c) == ca.TrustDomain() {
			list = append(list, c)
		}
	}
	return list
}

// replaced returns the CAs before this one that are in its file. A CA for nodes
// replaces those for nodes only, and any other CA the others.
func (ca *CA) replaced() []*x509.Certificate {
	return slices.DeleteFunc(ca.siblings(), func(c *x509.Certificate) bool { return forNodes(c) != forNodes(ca.cert) })
}

// again signs what an earlier certificate says.
func (ca *CA) again(old *x509.Certificate, public crypto.PublicKey, valid time.Duration) ([]byte, error) {
	if valid == 0 {
		valid = old.NotAfter.Sub(old.NotBefore) - Backdate
	}
	return sign(&x509.Certificate{
		RawSubject:  old.RawSubject,
		URIs:        old.URIs,
		DNSNames:    old.DNSNames,
		IPAddresses: old.IPAddresses,
		KeyUsage:    old.KeyUsage,
		ExtKeyUsage: old.ExtKeyUsage,

		UnknownExtKeyUsage: old.UnknownExtKeyUsage,
	}, ca.cert, public, ca.key, valid)
}

// onlyCertificate returns an error if a file in PEM has anything else than one
// certificate, such as its private key, which would be lost with the file.
func onlyCertificate(name string) error {
	b, err := regular.Read(name, regular.MaxConfig)
	if err != nil {
		return err
	}
	defer clear(b)
	_, rest := pem.Decode(b)
	if more, _ := pem.Decode(rest); more != nil {
		return fmt.Errorf("%s holds more than one certificate (%s): renew a copy that has only the first", name, more.Type)
	}
	return nil
}

// ReadCertificate returns the first certificate of a file in PEM.
func ReadCertificate(name string) (*x509.Certificate, error) {
	b, err := regular.Read(name, regular.MaxConfig)
	if err != nil {
		return nil, err
	}
	der := decode(b, "CERTIFICATE")
	if der == nil {
		return nil, fmt.Errorf("%s is not a certificate in PEM", name)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return cert, nil
}

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

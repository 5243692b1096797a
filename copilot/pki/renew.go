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
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/ctrlplane/pilot/internal/regular"
)

// Renew replaces a certificate that the CA has issued, or one before it that is still
// in its file, by one for the same name, usage and key. Any other is an error: who
// hands a certificate in may have written it. The new one is valid for the time
// given, or for as long as the one before if that is 0. The file keeps its owner and
// mode, and is replaced as a whole.
//
// If keyFile is not empty, a new private key replaces the one in that file, too.
// Programs that read the pair between the two replacements find that they do not
// match, and have to keep the pair they have.
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
	newCert, err := prepare(certFile, encode("CERTIFICATE", der))
	if err != nil {
		return nil, err
	}
	defer os.Remove(newCert.temporary)
	if key != nil {
		keyDER, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, err
		}
		defer clear(keyDER)
		newKey, err := prepare(keyFile, encode("PRIVATE KEY", keyDER))
		if err != nil {
			return nil, err
		}
		defer os.Remove(newKey.temporary)
		if err := newKey.replace(); err != nil {
			return nil, err
		}
	}
	if err := newCert.replace(); err != nil {
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
		return ca.issued(old)
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
	return ca.issued(old)
}

// issued returns an error unless the certificate's signature is that of the CA, or of
// one before it. Those of other trust domains must not name clients of this one.
func (ca *CA) issued(cert *x509.Certificate) error {
	for _, c := range append([]*x509.Certificate{ca.cert}, ca.replaced()...) {
		if cert.CheckSignatureFrom(c) == nil {
			return nil
		}
	}
	return fmt.Errorf("it was not issued by this CA, nor by one before it that is in %s: issue a new one with \"copilot enroll\"", CertFile)
}

// replaced returns the CAs before this one that are in its file: those of its trust
// domain.
func (ca *CA) replaced() (list []*x509.Certificate) {
	for _, c := range ca.file {
		if !c.Equal(ca.cert) && trustDomain(c) == ca.TrustDomain() {
			list = append(list, c)
		}
	}
	return list
}

// again signs what an earlier certificate says.
func (ca *CA) again(old *x509.Certificate, public crypto.PublicKey, valid time.Duration) ([]byte, error) {
	if valid == 0 {
		valid = old.NotAfter.Sub(old.NotBefore) - backdate
	}
	return sign(&x509.Certificate{
		RawSubject:  old.RawSubject,
		URIs:        old.URIs,
		DNSNames:    old.DNSNames,
		IPAddresses: old.IPAddresses,
		KeyUsage:    old.KeyUsage,
		ExtKeyUsage: old.ExtKeyUsage,
	}, ca.cert, public, ca.key, valid)
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

// replacement is a file that is going to take another's place.
type replacement struct{ temporary, name string }

// prepare writes a replacement with the owner and mode of the file that is there.
// It clears the content, which may be a key.
func prepare(name string, content []byte) (r replacement, err error) {
	defer clear(content)
	if r.name, err = filepath.EvalSymlinks(name); err != nil {
		return r, err
	}
	info, err := os.Stat(r.name)
	if err != nil {
		return r, err
	}
	if !info.Mode().IsRegular() {
		return r, fmt.Errorf("%s is not a regular file", r.name)
	}
	// 0600 until the owner is right.
	f, err := os.CreateTemp(filepath.Dir(r.name), "."+filepath.Base(r.name)+".*")
	if err != nil {
		return r, err
	}
	r.temporary = f.Name()
	_, err = f.Write(content)
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && err == nil {
		err = f.Chown(int(owner.Uid), int(owner.Gid))
	}
	if err == nil {
		err = f.Chmod(info.Mode().Perm())
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		os.Remove(r.temporary)
	}
	return r, err
}

// replace puts it in place, so that it survives a power failure.
func (r replacement) replace() error {
	if err := os.Rename(r.temporary, r.name); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(r.name))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

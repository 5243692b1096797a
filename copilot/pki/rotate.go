package pki

import (
	"crypto/x509"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/ctrlplane/pilot/internal/replacefile"
)

// Rotate replaces the CA in dir by a new one for the same trust domain. The
// certificates of earlier CAs stay in the file, after the new one, so that programs
// that trust the file trust what all of them have issued, until [DropOld].
//
// If it is interrupted, the old CA stays in force, and it can be run again.
func Rotate(dir string, valid time.Duration) error {
	before, err := Load(dir)
	if err != nil {
		return err
	}
	domain := before.TrustDomain()
	if domain == "" {
		return errors.New("the CA has no trust domain: it was not made by copilot init")
	}
	key, der, err := newCA(domain, valid, false)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	defer clear(keyDER)
	newKey, err := replacefile.Prepare(filepath.Join(dir, KeyFile), encode("PRIVATE KEY", keyDER))
	if err != nil {
		return err
	}
	defer newKey.Discard()
	newCert, err := replacefile.Prepare(filepath.Join(dir, CertFile), slices.Concat(encode("CERTIFICATE", der), encodeAll(before.file)))
	if err != nil {
		return err
	}
	defer newCert.Discard()
	// Trust first: the key decides which of the two issues certificates.
	if err := newCert.Commit(); err != nil {
		return err
	}
	return newKey.Commit()
}

// DropOld removes the certificates of the CAs before the one in force from the file
// of the CA in dir. It returns how many those were. The certificates in inUse, which
// are files, must not have been issued by one of them.
func DropOld(dir string, inUse []string) (int, error) {
	ca, err := Load(dir)
	if err != nil {
		return 0, err
	}
	replaced := ca.replaced()
	if len(replaced) == 0 {
		return 0, nil
	}
	var errs []error
	for _, file := range inUse {
		cert, err := ReadCertificate(file)
		if err == nil && slices.ContainsFunc(replaced, func(c *x509.Certificate) bool { return cert.CheckSignatureFrom(c) == nil }) {
			err = fmt.Errorf("%s was not issued by the new CA: renew it first", file)
		}
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return 0, err
	}
	left := slices.DeleteFunc(slices.Clone(ca.file), func(c *x509.Certificate) bool { return slices.ContainsFunc(replaced, c.Equal) })
	r, err := replacefile.Prepare(filepath.Join(dir, CertFile), encodeAll(left))
	if err != nil {
		return 0, err
	}
	defer r.Discard()
	return len(replaced), r.Commit()
}

func encodeAll(certs []*x509.Certificate) (text []byte) {
	for _, c := range certs {
		text = append(text, encode("CERTIFICATE", c.Raw)...)
	}
	return text
}

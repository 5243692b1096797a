package pki

import (
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// Rotate makes a new CA for the trust domain of the one in dir and has it take its
// place. The certificates of those before stay in the file, after the new one, so
// that programs that trust the file trust what all of them have issued, until
// [DropOld].
//
// Interrupted, it leaves the CA before in force, and can be run again.
func Rotate(dir string, valid time.Duration) error {
	before, err := Load(dir)
	if err != nil {
		return err
	}
	domain := before.TrustDomain()
	if domain == "" {
		return errors.New("the CA has no trust domain: it was not made by copilot init")
	}
	trusted, err := os.ReadFile(filepath.Join(dir, CertFile))
	if err != nil {
		return err
	}
	key, der, err := newCA(domain, valid)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	defer clear(keyDER)
	newKey, err := prepare(filepath.Join(dir, KeyFile), encode("PRIVATE KEY", keyDER))
	if err != nil {
		return err
	}
	defer os.Remove(newKey.temporary)
	newCert, err := prepare(filepath.Join(dir, CertFile), append(encode("CERTIFICATE", der), trusted...))
	if err != nil {
		return err
	}
	defer os.Remove(newCert.temporary)
	// Trust first: the key decides which of the two issues certificates.
	if err := newCert.replace(); err != nil {
		return err
	}
	return newKey.replace()
}

// DropOld removes all certificates but the one of the CA in force from the file of
// the CA in dir. It returns how many those were. The certificates in inUse, which
// are files, must not have been issued by one of them.
func DropOld(dir string, inUse []string) (int, error) {
	ca, err := Load(dir)
	if err != nil {
		return 0, err
	}
	name := filepath.Join(dir, CertFile)
	b, err := os.ReadFile(name)
	if err != nil {
		return 0, err
	}
	certs, err := parseAll(b)
	if err != nil {
		return 0, err
	}
	var errs []error
	for _, file := range inUse {
		cert, err := ReadCertificate(file)
		if err == nil {
			if err = cert.CheckSignatureFrom(ca.cert); err != nil {
				err = fmt.Errorf("%s was not issued by the new CA: renew it first", file)
			}
		}
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return 0, err
	}
	if len(certs) == 1 {
		return 0, nil
	}
	r, err := prepare(name, encode("CERTIFICATE", ca.cert.Raw))
	if err != nil {
		return 0, err
	}
	defer os.Remove(r.temporary)
	return len(certs) - 1, r.replace()
}

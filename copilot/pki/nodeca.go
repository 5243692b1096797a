package pki

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/replacefile"
)

// The files of the CA that a broker renews its clients' certificates with, beside
// those of the CA. It has a key of its own, so that the CA's can be kept elsewhere, and
// can't issue a server's certificate.
const (
	NodeCertFile = "node-ca.pem"
	NodeKeyFile  = "node-ca-key.pem"
)

// forNodes reports whether a CA is one that [RotateNodeCA] has made.
func forNodes(c *x509.Certificate) bool {
	return c.Subject.CommonName == nodeCAName+trustDomain(c)
}

// RotateNodeCA makes a CA for nodes in dir, or a new one in place of the one that is
// there, for the trust domain of the CA in dir, whose key it does not need. Its
// certificate is added to the file of the CA, so that its clients are accepted, as
// those of the previous one still are. The new key's file is passed to own while it is
// open: a user who can write to dir may put another file in its place later.
//
// If it is interrupted, it can be run again.
func RotateNodeCA(dir string, valid time.Duration, own func(*os.File) error) error {
	trusted := filepath.Join(dir, CertFile)
	all, err := certfile.Certificates(trusted)
	if err != nil {
		return fmt.Errorf("CA: %w", err)
	}
	i := slices.IndexFunc(all, func(c *x509.Certificate) bool {
		return strings.HasPrefix(c.Subject.CommonName, caName) && trustDomain(c) != ""
	})
	if i < 0 {
		return fmt.Errorf("%s has no CA that copilot init made", trusted)
	}
	certFile, keyFile := filepath.Join(dir, NodeCertFile), filepath.Join(dir, NodeKeyFile)
	before, err := certfile.Certificates(certFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, certfile.ErrNoCertificate) {
		return err
	}
	key, der, err := newCA(trustDomain(all[i]), valid, true)
	if err != nil {
		return err
	}
	newKey := keyFile + ".new"
	if err := os.Remove(newKey); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	defer os.Remove(newKey)
	if err := writeKey(newKey, key, own); err != nil {
		return err
	}
	// Trust first, and the key last: it decides which of the CAs issues certificates.
	trust, err := replacefile.Prepare(trusted, slices.Concat(encodeAll(all), encode("CERTIFICATE", der)))
	if err != nil {
		return err
	}
	defer trust.Discard()
	if err := trust.Commit(); err != nil {
		return err
	}
	if len(before) == 0 {
		os.Remove(certFile) // one that was cut short holds none
		err = writeNew(certFile, "CERTIFICATE", der, 0o644, nil)
	} else {
		var r replacefile.Replacement
		if r, err = replacefile.Prepare(certFile, slices.Concat(encode("CERTIFICATE", der), encodeAll(before))); err == nil {
			defer r.Discard()
			err = r.Commit()
		}
	}
	if err != nil {
		return err
	}
	return os.Rename(newKey, keyFile)
}

// DropOldNodeCAs removes the certificates of the CAs for nodes before the one in dir
// from the files of both CAs. It returns how many those were.
func DropOldNodeCAs(dir string) (int, error) {
	certFile := filepath.Join(dir, NodeCertFile)
	ca, err := LoadFiles(certFile, filepath.Join(dir, NodeKeyFile))
	if err != nil {
		return 0, err
	}
	dropped := 0
	for _, name := range []string{certFile, filepath.Join(dir, CertFile)} {
		all, err := certfile.Certificates(name)
		if err != nil {
			return 0, err
		}
		left := slices.DeleteFunc(slices.Clone(all), func(c *x509.Certificate) bool {
			return forNodes(c) && !c.Equal(ca.cert) && trustDomain(c) == ca.TrustDomain()
		})
		r, err := replacefile.Prepare(name, encodeAll(left))
		if err != nil {
			return 0, err
		}
		defer r.Discard()
		if err := r.Commit(); err != nil {
			return 0, err
		}
		dropped = len(all) - len(left)
	}
	return dropped, nil
}

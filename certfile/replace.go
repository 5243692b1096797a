//go:build unix

package certfile

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
)

// ReplacePair replaces the files of a pair by a certificate and its key, both in PEM.
// They keep their owner and mode. It clears key.
//
// The key's file gets the certificate, too, behind the key. With it, it is a pair by
// itself: from the moment it is in place [Load] returns the new pair, also if this
// is cut short before the certificate's own file is replaced. [CompletePair] does
// that later.
func ReplacePair(certFile, keyFile string, cert, key []byte) error {
	defer clear(key)
	newKey, err := Prepare(keyFile, slices.Concat(key, cert))
	if err != nil {
		return err
	}
	defer newKey.Discard()
	newCert := newKey
	if certFile != keyFile {
		if newCert, err = Prepare(certFile, bytes.Clone(cert)); err != nil {
			return err
		}
		defer newCert.Discard()
		if err := newKey.Commit(); err != nil {
			return err
		}
	}
	return newCert.Commit()
}

// CompletePair puts the certificate that is in the key's file into the certificate's
// own file, if that has an older one of another key: [ReplacePair] was cut short. A
// newer one is somebody's who is going to replace the key, too.
func CompletePair(certFile, keyFile string) error {
	cert, key, err := readPair(certFile, keyFile)
	defer clear(key)
	if err != nil {
		return err
	}
	if _, err := tls.X509KeyPair(cert, key); err == nil {
		return nil
	}
	whole, err := tls.X509KeyPair(key, key)
	if err != nil {
		return nil // it was not ReplacePair
	}
	if old := leaf(cert); old == nil || !old.NotBefore.Before(whole.Leaf.NotBefore) {
		return nil
	}
	newCert, err := Prepare(certFile, encodeChain(whole.Certificate))
	if err != nil {
		return err
	}
	defer newCert.Discard()
	return newCert.Commit()
}

func encodeChain(chain [][]byte) (text []byte) {
	for _, der := range chain {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return text
}

// leaf returns the first certificate in PEM, or nil.
func leaf(text []byte) *x509.Certificate {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil
	}
	return cert
}

// Replacement is a file that is going to take another's place.
type Replacement struct{ temporary, name string }

// Prepare writes a replacement with the owner and mode of the file that is there.
// It clears the content, which may be a key.
func Prepare(name string, content []byte) (r Replacement, err error) {
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

// Discard removes a replacement that was not committed.
func (r Replacement) Discard() { os.Remove(r.temporary) }

// Commit puts the replacement in place, so that it survives a power failure.
func (r Replacement) Commit() error {
	if err := os.Rename(r.temporary, r.name); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(r.name))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

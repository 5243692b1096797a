package certfile

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"slices"

	"github.com/ctrlplane/pilot/internal/replacefile"
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
	newKey, err := replacefile.Prepare(keyFile, slices.Concat(key, cert))
	if err != nil {
		return err
	}
	defer newKey.Discard()
	newCert := newKey
	if certFile != keyFile {
		if newCert, err = replacefile.Prepare(certFile, bytes.Clone(cert)); err != nil {
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
// own file, if that has an older one of another key: [ReplacePair] was interrupted. A
// newer one was put there by an administrator who is about to replace the key too.
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
	newCert, err := replacefile.Prepare(certFile, encodeChain(whole.Certificate))
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

// Package certfile reads what TLS needs from PEM files: a certificate that may
// be replaced while it is in use, as short-lived ones are, and those to trust.
package certfile

import (
	"crypto/tls"
	"sync"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/internal/regular"
)

// Pair is a certificate and its private key, in PEM files. It is safe for
// concurrent use.
type Pair struct {
	certFile, keyFile string

	mu   sync.Mutex
	read unchanged
	last *tls.Certificate
}

// KeyPair reads a certificate and its private key from PEM files, as
// [tls.LoadX509KeyPair] does, if they are regular files.
func KeyPair(certFile, keyFile string) (tls.Certificate, error) {
	cert, key, err := readPair(certFile, keyFile)
	defer clear(key)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.X509KeyPair(cert, key)
}

// Load reads a pair for the first time.
func Load(certFile, keyFile string) (*Pair, error) {
	p := &Pair{certFile: certFile, keyFile: keyFile, read: unchanged{files: []string{certFile, keyFile}}}
	if err := p.load(); err != nil {
		return nil, err
	}
	return p, nil
}

// Certificate returns the pair that is in the files now. While one is replaced and the
// other is not yet, it returns the pair that they held before.
func (p *Pair) Certificate() *tls.Certificate {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.load(); err != nil {
		logrus.WithError(err).WithField("certificate", p.certFile).Warn("can't reload the certificate: the previous one stays in use")
	}
	return p.last
}

func (p *Pair) load() error {
	same, used := p.read.since()
	if same {
		return nil
	}
	cert, err := loadPair(p.certFile, p.keyFile)
	if err != nil {
		return err
	}
	p.last = cert
	used()
	return nil
}

// loadPair reads a pair. Where the certificate is not the key's, it is the pair in the
// key's file, if there is one: see [ReplacePair].
func loadPair(certFile, keyFile string) (*tls.Certificate, error) {
	cert, key, err := readPair(certFile, keyFile)
	defer clear(key)
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		var inKey error
		if pair, inKey = tls.X509KeyPair(key, key); inKey != nil {
			return nil, err
		}
	}
	return &pair, nil
}

func readPair(certFile, keyFile string) (cert, key []byte, err error) {
	if cert, err = regular.Read(certFile, regular.MaxConfig); err != nil {
		return nil, nil, err
	}
	key, err = regular.Read(keyFile, regular.MaxConfig)
	return cert, key, err
}

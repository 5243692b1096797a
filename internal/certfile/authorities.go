package certfile

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/internal/regular"
)

// Authorities are the CAs of clients in a PEM file, which may be replaced while
// clients are connected. They are safe for concurrent use.
type Authorities struct {
	file string

	mu       sync.Mutex
	pem      []byte // that pool was made of
	pool     *x509.CertPool
	unusable bool // the file, when it was read last
}

// LoadAuthorities reads the CAs in a file for the first time.
func LoadAuthorities(file string) (*Authorities, error) {
	a := &Authorities{file: file}
	return a, a.read()
}

// Pool returns the CAs that are in the file now: the same pool until others are.
// While the file can't be used, those that it held before count.
func (a *Authorities) Pool() *x509.CertPool {
	a.mu.Lock()
	defer a.mu.Unlock()
	err := a.read()
	if err != nil && !a.unusable {
		logrus.WithError(err).WithField("ca", a.file).Warn("CA not read again: the one before is used")
	}
	a.unusable = err != nil
	return a.pool
}

func (a *Authorities) read() error {
	b, err := regular.Read(a.file, regular.MaxConfig)
	if err != nil || a.pool != nil && bytes.Equal(b, a.pem) {
		return err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return fmt.Errorf("%s %w", a.file, ErrNoCertificate)
	}
	a.pem, a.pool = b, pool
	return nil
}

// verifyAgain is for how long a certificate is not verified again by the same CAs,
// of which one may expire.
const verifyAgain = time.Minute

// Verified is what verifying the certificate of one connection came to.
type Verified struct {
	mu     sync.Mutex
	pool   *x509.CertPool
	at     time.Time
	chains [][]*x509.Certificate
	err    error
}

// Verify verifies the certificates that a client has shown, its own first, by the CAs
// that are trusted now, which may be others than when it connected.
func (v *Verified) Verify(a *Authorities, shown []*x509.Certificate) (chains [][]*x509.Certificate, err error) {
	pool := a.Pool()
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.pool == pool && time.Since(v.at) < verifyAgain {
		return v.chains, v.err
	}
	intermediates := x509.NewCertPool()
	for _, c := range shown[1:] {
		intermediates.AddCert(c)
	}
	v.pool, v.at = pool, time.Now()
	v.chains, v.err = shown[0].Verify(x509.VerifyOptions{Roots: pool, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	return v.chains, v.err
}

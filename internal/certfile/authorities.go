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
	read     unchanged
	pem      []byte // that pool was made of
	pool     *x509.CertPool
	unusable bool // the file, when it was read last
}

// LoadAuthorities reads the CAs in a file for the first time.
func LoadAuthorities(file string) (*Authorities, error) {
	a := &Authorities{file: file, read: unchanged{files: []string{file}}}
	return a, a.load()
}

// Pool returns the CAs that are in the file now: the same pool until the file changes.
// While the file can't be used, it returns those that it held before.
func (a *Authorities) Pool() *x509.CertPool {
	a.mu.Lock()
	defer a.mu.Unlock()
	err := a.load()
	if err != nil && !a.unusable {
		logrus.WithError(err).WithField("ca", a.file).Warn("can't reload the CA: the previous one stays in use")
	}
	a.unusable = err != nil
	return a.pool
}

func (a *Authorities) load() error {
	same, used := a.read.since()
	if same {
		return nil
	}
	b, err := regular.Read(a.file, regular.MaxConfig)
	if err != nil {
		return err
	}
	if a.pool == nil || !bytes.Equal(b, a.pem) {
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(b) {
			return fmt.Errorf("%s %w", a.file, ErrNoCertificate)
		}
		a.pem, a.pool = b, pool
	}
	used()
	return nil
}

// verifiedTTL is how long a certificate is not verified again by the same CAs, of which
// one may expire.
const verifiedTTL = time.Minute

// Verified is the result of verifying the certificate of one connection.
type Verified struct {
	mu     sync.Mutex
	pool   *x509.CertPool
	at     time.Time
	chains [][]*x509.Certificate
	err    error
}

// Verify verifies the certificates that a client has shown, its own first, by the CAs
// that are trusted now, which may not be those of when it connected.
func (v *Verified) Verify(a *Authorities, shown []*x509.Certificate) (chains [][]*x509.Certificate, err error) {
	pool := a.Pool()
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.pool == pool && time.Since(v.at) < verifiedTTL {
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

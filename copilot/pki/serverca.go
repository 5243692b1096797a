package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/replacefile"
)

// The files of the CA that a broker issues its own certificates with.
const (
	ServerCACertFile = "server-ca.pem"
	ServerCAKeyFile  = "server-ca-key.pem"
)

// servedFor is how long a certificate is valid that a broker issues for itself. It is
// replaced when a third of that time is left. Each start issues one, so it is valid for
// clients whose clocks are behind by servedBackdate.
const (
	servedFor      = 7 * 24 * time.Hour
	servedBackdate = 24 * time.Hour
)

// CreateServerCA makes a CA in dir that can issue certificates for servers named hosts,
// which are names and addresses, and for nothing else. A CA file in dir gets its
// certificate, so that clients that trust that file trust these servers. The files must
// not exist. The private key's file is passed to own while it is open.
func CreateServerCA(dir string, hosts []string, valid time.Duration, own func(*os.File) error) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		Subject:                     pkix.Name{CommonName: "copilot server CA of " + hosts[0]},
		KeyUsage:                    x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		ExtKeyUsage:                 []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IsCA:                        true,
		MaxPathLenZero:              true,
		BasicConstraintsValid:       true,
		PermittedDNSDomainsCritical: true,
	}
	for _, h := range hosts {
		ip := net.ParseIP(h)
		if ip4 := ip.To4(); ip4 != nil {
			ip = ip4
		}
		if ip == nil {
			template.PermittedDNSDomains = append(template.PermittedDNSDomains, h)
		} else {
			template.PermittedIPRanges = append(template.PermittedIPRanges, &net.IPNet{IP: ip, Mask: net.CIDRMask(8*len(ip), 8*len(ip))})
		}
	}
	// A kind of names of which none is permitted is not limited otherwise.
	if template.PermittedDNSDomains == nil {
		template.ExcludedDNSDomains = []string{""}
	}
	if template.PermittedIPRanges == nil {
		template.ExcludedIPRanges = []*net.IPNet{
			{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, {IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)},
		}
	}
	der, err := sign(template, nil, key.Public(), key, valid)
	if err != nil {
		return err
	}
	trusted := filepath.Join(dir, CertFile)
	all, err := certfile.Certificates(trusted)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("CA: %w", err)
	}
	certFile, keyFile := filepath.Join(dir, ServerCACertFile), filepath.Join(dir, ServerCAKeyFile)
	if err := writePair(certFile, der, keyFile, key, own); err != nil || len(all) == 0 {
		return err
	}
	r, err := replacefile.Prepare(trusted, slices.Concat(encodeAll(all), encode("CERTIFICATE", der)))
	if err == nil {
		defer r.Discard()
		err = r.Commit()
	}
	if err != nil { // it can be run again
		return errors.Join(err, os.Remove(certFile), os.Remove(keyFile))
	}
	return nil
}

// Served returns the certificate that a server shows, now and whenever it is called: the
// one in certFile or, if that is a CA of [CreateServerCA], one that is issued by it, for
// all of the CA's names, and replaced in time. Files that have changed are read again.
// It is safe for concurrent use.
func Served(certFile, keyFile string) (func() *tls.Certificate, error) {
	pair, err := certfile.Load(certFile, keyFile)
	if err != nil {
		return nil, err
	}
	s := &served{pair: pair, file: certFile}
	if _, err := s.current(time.Now()); err != nil {
		return nil, err
	}
	return func() *tls.Certificate {
		cert, err := s.current(time.Now())
		if err != nil {
			logrus.WithError(err).Error("no new server certificate issued: the previous one stays in use")
		}
		return cert
	}, nil
}

// served issues certificates by the CA in a pair of files, if it is one.
type served struct {
	pair *certfile.Pair
	file string

	mu      sync.Mutex
	ca      []byte // that issued the last one
	last    *tls.Certificate
	renewAt time.Time
}

// current returns the certificate to show. With an error it is the last one, if there is one.
func (s *served) current(now time.Time) (*tls.Certificate, error) {
	pair := s.pair.Certificate()
	s.mu.Lock()
	defer s.mu.Unlock()
	// A server's certificate that has signed itself may be a CA's too, and has names.
	if !pair.Leaf.IsCA || len(pair.Leaf.DNSNames)+len(pair.Leaf.IPAddresses) > 0 {
		s.last, s.ca = pair, nil
		return pair, nil
	}
	if s.ca != nil && bytes.Equal(s.ca, pair.Certificate[0]) && now.Before(s.renewAt) {
		return s.last, nil
	}
	cert, err := issueServed(pair, now)
	if err != nil {
		return s.last, fmt.Errorf("%s: %w", s.file, err)
	}
	s.ca, s.last, s.renewAt = pair.Certificate[0], cert, now.Add(cert.Leaf.NotAfter.Sub(now)*2/3)
	return cert, nil
}

// issueServed issues a certificate for the names that a CA is limited to.
func issueServed(ca *tls.Certificate, now time.Time) (*tls.Certificate, error) {
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: "copilot"},
		DNSNames:    ca.Leaf.PermittedDNSDomains,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, network := range ca.Leaf.PermittedIPRanges {
		if ones, bits := network.Mask.Size(); ones == bits {
			template.IPAddresses = append(template.IPAddresses, network.IP)
		}
	}
	if len(template.DNSNames)+len(template.IPAddresses) == 0 {
		return nil, errors.New("it is a CA that is not limited to a server's names: use a certificate, or a CA of \"copilot certs server-ca\"")
	}
	signer, ok := ca.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, errors.New("its private key can't sign")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	from, until := now.Add(-servedBackdate), now.Add(servedFor)
	if from.Before(ca.Leaf.NotBefore) {
		from = ca.Leaf.NotBefore
	}
	if until.After(ca.Leaf.NotAfter) {
		until = ca.Leaf.NotAfter
	}
	if !now.Before(until) {
		return nil, fmt.Errorf("the CA itself was valid until %s: make a new one with \"copilot certs server-ca\"", until.Format(time.RFC3339))
	}
	der, err := signBetween(from, until, template, ca.Leaf, key.Public(), signer)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	return &tls.Certificate{Certificate: append([][]byte{der}, ca.Certificate...), PrivateKey: key, Leaf: leaf}, err
}

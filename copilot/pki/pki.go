// Package pki is a small certificate authority, for brokers and nodes that have
// none: a CA, and the certificates that it issues.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/regular"
)

// The files of a CA in its directory.
const (
	CertFile = "ca.pem"
	KeyFile  = "ca-key.pem"
)

// Backdate is how long before its issuance a certificate becomes valid, so that
// machines whose clocks are behind can use it.
const Backdate = 5 * time.Minute

// CA issues certificates.
type CA struct {
	cert *x509.Certificate
	key  crypto.Signer
	// file are the certificates in its file: its own, those of the CAs that it
	// replaces, and those of others that are trusted.
	file []*x509.Certificate
}

// Create makes a CA in dir, for trustDomain, that is valid for that time. The
// files must not exist.
func Create(dir, trustDomain string, hold time.Duration) (*CA, error) {
	if !validDomain.MatchString(trustDomain) {
		return nil, fmt.Errorf("trust domain %q: use lower-case letters, digits, dots, dashes and underscores, as in example.com", trustDomain)
	}
	key, der, err := newCA(trustDomain, hold, false)
	if err != nil {
		return nil, err
	}
	if err := writeKey(filepath.Join(dir, KeyFile), key, nil); err != nil {
		return nil, err
	}
	if err := writeNew(filepath.Join(dir, CertFile), "CERTIFICATE", der, 0o644, nil); err != nil {
		return nil, err
	}
	return Load(dir)
}

// newCA returns a CA's private key and its certificate. One for nodes issues
// clients' certificates only.
func newCA(trustDomain string, hold time.Duration, forNodes bool) (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: caName + trustDomain},
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: trustDomain}},
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		IsCA:                  true,
		MaxPathLenZero:        true,
		BasicConstraintsValid: true,
	}
	if forNodes {
		template.Subject.CommonName = nodeCAName + trustDomain
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	}
	der, err := sign(template, nil, key.Public(), key, hold)
	return key, der, err
}

// The common names of the CAs that are made here begin so, and end in the trust domain.
const (
	caName     = "copilot CA of "
	nodeCAName = "copilot node CA of "
)

// Load reads the CA in dir, as [LoadFiles] does.
func Load(dir string) (*CA, error) {
	return LoadFiles(filepath.Join(dir, CertFile), filepath.Join(dir, KeyFile))
}

// LoadFiles reads a CA. Of several certificates in its file it is the one that
// belongs to the key: the others are trusted, too, while the CA is replaced.
func LoadFiles(certFile, keyFile string) (*CA, error) {
	certs, err := certfile.Certificates(certFile)
	if err != nil {
		return nil, fmt.Errorf("CA: %w", err)
	}
	keyPEM, err := regular.Read(keyFile, regular.MaxConfig)
	if err != nil {
		return nil, fmt.Errorf("CA: %w", err)
	}
	defer clear(keyPEM)
	key := decode(keyPEM, "PRIVATE KEY")
	if key == nil {
		return nil, fmt.Errorf("CA: %s holds no private key in PEM (PKCS#8)", keyFile)
	}
	defer clear(key)
	ca := &CA{file: certs}
	parsed, err := x509.ParsePKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("CA: %s: it is no PKCS#8 key", keyFile)
	}
	var ok bool
	if ca.key, ok = parsed.(crypto.Signer); !ok {
		return nil, fmt.Errorf("CA: %s can't sign", keyFile)
	}
	public, ok := ca.key.Public().(interface{ Equal(crypto.PublicKey) bool })
	i := slices.IndexFunc(certs, func(c *x509.Certificate) bool { return ok && public.Equal(c.PublicKey) })
	if i < 0 {
		return nil, fmt.Errorf("CA: %s is not the key of %s", keyFile, certFile)
	}
	if ca.cert = certs[i]; !ca.cert.IsCA {
		return nil, fmt.Errorf("CA: %s is no CA's certificate", certFile)
	}
	return ca, nil
}

// TrustDomain returns what the SPIFFE IDs of the CA's certificates begin with,
// after spiffe://.
func (ca *CA) TrustDomain() string { return trustDomain(ca.cert) }

func trustDomain(cert *x509.Certificate) string {
	for _, u := range cert.URIs {
		if u.Scheme == "spiffe" {
			return u.Host
		}
	}
	return ""
}

var (
	validDomain = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,252}$`)
	validPath   = regexp.MustCompile(`^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$`)
)

// Client describes the certificate of a broker's client.
type Client struct {
	// Path is the SPIFFE ID's, such as node/worker-7.
	Path string
	// Hold is for how long.
	Hold time.Duration
}

// ID returns the SPIFFE ID: spiffe://TRUST-DOMAIN/PATH.
func (ca *CA) ID(path string) (*url.URL, error) {
	domain := ca.TrustDomain()
	if domain == "" {
		return nil, errors.New("the CA has no trust domain: it was not made by copilot init")
	}
	for element := range strings.SplitSeq(path, "/") {
		if element == "." || element == ".." {
			return nil, fmt.Errorf("%q can't be in a SPIFFE ID: a part is only dots", path)
		}
	}
	if !validPath.MatchString(path) || len(path) > 1024 {
		return nil, fmt.Errorf("%q can't be in a SPIFFE ID: use letters, digits, dots, dashes and underscores, and slashes between them", path)
	}
	return &url.URL{Scheme: "spiffe", Host: domain, Path: "/" + path}, nil
}

// IssueClient writes a new private key and its certificate into files that must
// not exist.
func (ca *CA) IssueClient(c Client, certFile, keyFile string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := ca.client(c, key.Public())
	if err != nil {
		return err
	}
	return writePair(certFile, der, keyFile, key, nil)
}

// Sizes of RSA keys that are signed, in bits: the least is that of NIST SP 800-131A,
// and larger ones than the most take a server long to verify.
const (
	minRSA = 2048
	maxRSA = 8192
)

// SignClient writes a certificate for the key of a certificate signing request
// in PEM, of which nothing else counts.
func (ca *CA) SignClient(c Client, request []byte, certFile string) error {
	csr, err := parseRequest(request)
	if err != nil {
		return err
	}
	der, err := ca.client(c, csr.PublicKey)
	if err != nil {
		return err
	}
	return writeNew(certFile, "CERTIFICATE", der, 0o644, nil)
}

// parseRequest returns a certificate signing request in PEM whose sender has the
// private key.
func parseRequest(request []byte) (*x509.CertificateRequest, error) {
	der := decode(request, "CERTIFICATE REQUEST")
	if der == nil {
		return nil, errors.New("it is no certificate signing request in PEM")
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("certificate signing request: %w", err)
	}
	// Before the signature, which takes as long as the key is large.
	switch key := csr.PublicKey.(type) {
	case *ecdsa.PublicKey, ed25519.PublicKey:
	case *rsa.PublicKey:
		if n := key.N.BitLen(); n < minRSA || n > maxRSA {
			return nil, fmt.Errorf("certificate signing request: its RSA key has %d bits, and %d to %d are possible", n, minRSA, maxRSA)
		}
	default:
		return nil, fmt.Errorf("certificate signing request: keys of the type %s are not signed: use ECDSA, Ed25519 or RSA", csr.PublicKeyAlgorithm)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("certificate signing request: %w", err)
	}
	return csr, nil
}

func (ca *CA) client(c Client, public crypto.PublicKey) ([]byte, error) {
	id, err := ca.ID(c.Path)
	if err != nil {
		return nil, err
	}
	return sign(&x509.Certificate{
		Subject:     pkix.Name{CommonName: c.Path},
		URIs:        []*url.URL{id},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, ca.cert, public, ca.key, c.Hold)
}

// IssueServer writes a new private key and its certificate for hosts, which are names
// and addresses, into files that must not exist. The private key's file is passed to
// own while it is open, unless own is nil: a user who can write to its directory may
// put another file in its place once it is closed.
func (ca *CA) IssueServer(hosts []string, hold time.Duration, certFile, keyFile string, own func(*os.File) error) error {
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: "copilot"},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, h)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := sign(template, ca.cert, key.Public(), ca.key, hold)
	if err != nil {
		return err
	}
	return writePair(certFile, der, keyFile, key, own)
}

// sign signs a certificate, by itself if parent is nil, that is valid for that
// time, and not longer than its parent.
func sign(template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer, hold time.Duration) ([]byte, error) {
	if hold <= 0 {
		return nil, fmt.Errorf("a certificate cannot be valid for %s", hold)
	}
	now := time.Now()
	return signBetween(now.Add(-Backdate), now.Add(hold), template, parent, public, key)
}

func signBetween(notBefore, notAfter time.Time, template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) ([]byte, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	template.SerialNumber, template.NotBefore, template.NotAfter = serial, notBefore, notAfter
	if parent == nil {
		parent = template
	} else if template.NotAfter.After(parent.NotAfter) {
		return nil, fmt.Errorf("the CA itself is valid only until %s", parent.NotAfter.Format(time.RFC3339))
	}
	return x509.CreateCertificate(rand.Reader, template, parent, public, key)
}

func writePair(certFile string, der []byte, keyFile string, key *ecdsa.PrivateKey, own func(*os.File) error) error {
	if err := writeKey(keyFile, key, own); err != nil {
		return err
	}
	return writeNew(certFile, "CERTIFICATE", der, 0o644, nil)
}

func writeKey(name string, key *ecdsa.PrivateKey, own func(*os.File) error) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	defer clear(der)
	return writeNew(name, "PRIVATE KEY", der, 0o600, own)
}

// writeNew writes a file that is whole on disk or not there at all.
func writeNew(name, kind string, der []byte, mode os.FileMode, own func(*os.File) error) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s already exists, and is not overwritten", name)
	}
	if err != nil {
		return err
	}
	err = pem.Encode(f, &pem.Block{Type: kind, Bytes: der})
	if err == nil && own != nil {
		err = own(f)
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(name))
	}
	return nil
}

func decode(b []byte, kind string) []byte {
	block, _ := pem.Decode(b)
	if block == nil || block.Type != kind {
		return nil
	}
	return block.Bytes
}

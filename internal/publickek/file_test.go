package publickek

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// authority is a CA of the tests.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newAuthority(t testing.TB, parent *authority, change func(*x509.Certificate)) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	if change != nil {
		change(template)
	}
	if parent == nil {
		parent = &authority{template, key}
	}
	return &authority{parent.issue(t, template, key.Public()), key}
}

func (a *authority) issue(t testing.TB, template *x509.Certificate, public crypto.PublicKey) *x509.Certificate {
	t.Helper()
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore = time.Now().Add(-time.Hour)
	if template.NotAfter.IsZero() {
		template.NotAfter = time.Now().Add(24 * time.Hour)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, public, a.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func (a *authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

// signer returns a certificate for signing public keys, changed.
func (a *authority) signer(t testing.TB, key crypto.Signer, change func(*x509.Certificate)) Signer {
	t.Helper()
	if key == nil {
		var err error
		if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "public keys"}, URIs: []*url.URL{SignerID("example.com")},
		KeyUsage: x509.KeyUsageDigitalSignature, UnknownExtKeyUsage: []asn1.ObjectIdentifier{SignerUsage},
	}
	if change != nil {
		change(template)
	}
	return Signer{Chain: []*x509.Certificate{a.issue(t, template, key.Public())}, Key: key}
}

// signed returns the file of a new public key of team-a version 3.
func signed(t testing.TB, s Signer, valid time.Duration) (PublicKey, []byte) {
	t.Helper()
	key := derive(t, newKEK(), "team-a", 3).Public()
	_, text, err := s.Sign(key, time.Now(), valid)
	if err != nil {
		t.Fatal(err)
	}
	return key, text
}

// verified parses and verifies a file.
func verified(text []byte, roots *x509.CertPool) (PublicKey, error) {
	f, err := Parse(text)
	if err != nil {
		return PublicKey{}, err
	}
	return f.Verify(roots, time.Now())
}

func TestFileIsThatOfItsBroker(t *testing.T) {
	fipstest.Refused(t, fipstest.HPKE)
	ca := newAuthority(t, nil, nil)
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	largeKey, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]crypto.Signer{"P-256": nil, "P-384": largeKey, "Ed25519": edKey, "RSA": rsaKey} {
		want, text := signed(t, ca.signer(t, key, nil), time.Hour)
		for how, text := range map[string][]byte{
			"as it is":  text,
			"by mail":   append([]byte("\r\n \r\n"), bytes.ReplaceAll(text, []byte("\n"), []byte(" \r\n"))...),
			"cut lines": bytes.TrimSpace(text),
		} {
			got, err := verified(text, ca.pool())
			if err != nil || got.ID != "team-a" || got.Version != 3 || !bytes.Equal(got.Bytes(), want.Bytes()) {
				t.Errorf("%s, %s: %s version %d, %v", name, how, got.ID, got.Version, err)
			}
		}
	}
	between := newAuthority(t, ca, nil)
	s := between.signer(t, nil, nil)
	s.Chain = append(s.Chain, between.cert)
	if _, text := signed(t, s, time.Hour); true {
		if _, err := verified(text, ca.pool()); err != nil {
			t.Errorf("with a CA between: %v", err)
		}
	}
}

func TestFileThatWasChangedIsRefused(t *testing.T) {
	fipstest.Refused(t, fipstest.HPKE)
	ca := newAuthority(t, nil, nil)
	s := ca.signer(t, nil, nil)
	_, text := signed(t, s, time.Hour)
	_, other := signed(t, s, time.Hour)
	end := bytes.Index(text, []byte("-----BEGIN PILOT SIGNATURE"))
	otherEnd := bytes.Index(other, []byte("-----BEGIN PILOT SIGNATURE"))
	replace := func(old, new string) []byte { return bytes.Replace(text, []byte(old), []byte(new), 1) }
	const changed = "was changed after it was signed"
	for name, test := range map[string]struct {
		text []byte
		want string
	}{
		"KEK":                {replace("KEK: team-a", "KEK: team-b"), changed},
		"version":            {replace("Version: 3", "Version: 4"), changed},
		"version spelled":    {replace("Version: 3", "Version: 03"), changed},
		"broker":             {replace("//example.com", "//example.org"), changed},
		"expiry":             {replace("Expires: 2", "Expires: 3"), changed},
		"suite":              {replace("HPKE-MLKEM768", "HPKE-MLKEM512"), "is for the suite"},
		"no suite":           {replace("Suite: HPKE-MLKEM768-X25519-HKDF-SHA256-A256GCM\n", ""), "is for the suite"},
		"another header":     {replace("KEK: team-a\n", "KEK: team-a\nOld: yes\n"), changed},
		"header twice":       {replace("KEK: team-a\n", "KEK: team-b\nKEK: team-a\n"), changed},
		"key":                {slices.Concat(other[:otherEnd], text[end:]), changed},
		"text before":        {append([]byte("for team-b\n"), text...), changed},
		"text after":         {append(bytes.Clone(text), "more\n"...), changed},
		"block twice":        {append(bytes.Clone(text), text...), "is not the file of a public key"},
		"not signed":         {text[:end], "is not signed"},
		"no certificate":     {text[:bytes.Index(text, []byte("-----BEGIN CERT"))], "is not the file of a public key"},
		"cut":                {text[:len(text)-40], changed},
		"cut in its key":     {text[:600], "is not the file of a public key"},
		"empty":              {nil, "is not the file of a public key"},
		"something else":     {[]byte("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"), "is not the file of a public key"},
		"too long":           {append(bytes.Clone(text), bytes.Repeat([]byte("\n"), MaxFile)...), "more than 64 KiB"},
		"version 0":          {replace("Version: 3", "Version: 0"), "is not the file of a public key"},
		"KEK with a space":   {replace("KEK: team-a", "KEK: team a"), "not allowed"},
		"time without a day": {replace("Created: 2", "Created: x"), "is not the file of a public key"},
	} {
		if _, err := verified(test.text, ca.pool()); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
	}
}

func TestFileOfAnotherSignerIsRefused(t *testing.T) {
	fipstest.Refused(t, fipstest.HPKE)
	ca, other := newAuthority(t, nil, nil), newAuthority(t, nil, nil)
	forClients := newAuthority(t, ca, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} })
	roots := ca.pool()
	roots.AddCert(forClients.cert) // as ca.pem has the CA that renews nodes' certificates
	sign := func(s Signer) []byte {
		f := &File{KEK: "team-a", Version: 3, Broker: s.Chain[0].URIs[0].String(), Key: derive(t, newKEK(), "team-a", 3).Public().Bytes(), Created: time.Now(), Expires: time.Now().Add(time.Hour)}
		return encodeAnyhow(t, s, f)
	}
	for name, test := range map[string]struct {
		text []byte
		want string
	}{
		"another broker": {sign(other.signer(t, nil, nil)), "is another broker's"},
		"a server's certificate": {sign(ca.signer(t, nil, func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
			c.UnknownExtKeyUsage = nil
		})), "not for signing public keys"},
		"a client's certificate": {sign(ca.signer(t, nil, func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
			c.UnknownExtKeyUsage = nil
		})), "not for signing public keys"},
		"no usage":            {sign(ca.signer(t, nil, func(c *x509.Certificate) { c.UnknownExtKeyUsage = nil })), "not for signing public keys"},
		"another name":        {sign(ca.signer(t, nil, func(c *x509.Certificate) { c.URIs[0].Path = "/node/worker-7" })), "not for signing public keys"},
		"a host name besides": {sign(ca.signer(t, nil, func(c *x509.Certificate) { c.DNSNames = []string{"a"} })), "not for signing public keys"},
		"the CA for nodes":    {sign(forClients.signer(t, nil, nil)), "not for signing public keys"},
		"expired certificate": {sign(ca.signer(t, nil, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })), "is valid from"},
		"another's signature": {forged(t, sign(ca.signer(t, nil, nil)), sign(ca.signer(t, nil, nil))), "was changed after it was signed"},
	} {
		if _, err := verified(test.text, roots); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
	}
}

// encodeAnyhow signs a file with any certificate.
func encodeAnyhow(t testing.TB, s Signer, f *File) []byte {
	t.Helper()
	// Sign refuses what is not for signing, so the right certificate is exchanged after it.
	right := newAuthority(t, nil, nil).signer(t, s.Key, func(c *x509.Certificate) {
		c.URIs = []*url.URL{SignerID(strings.TrimSuffix(s.Chain[0].URIs[0].Host, "/"))}
	})
	_, text, err := right.Sign(PublicKey{ID: f.KEK, Version: f.Version, key: must(kem().NewPublicKey(f.Key))}, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	text = text[:bytes.Index(text, []byte("-----BEGIN CERT"))]
	for _, c := range s.Chain {
		text = append(text, pemCertificate(c)...)
	}
	return text
}

// forged returns a file with the certificates of another.
func forged(t testing.TB, text, other []byte) []byte {
	t.Helper()
	const begin = "-----BEGIN CERT"
	return slices.Concat(text[:bytes.Index(text, []byte(begin))], other[bytes.Index(other, []byte(begin)):])
}

func TestFileExpires(t *testing.T) {
	fipstest.Refused(t, fipstest.HPKE)
	ca := newAuthority(t, nil, nil)
	s := ca.signer(t, nil, nil)
	_, text := signed(t, s, time.Hour)
	f, err := Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		at   time.Time
		want string
	}{
		"at its end":    {f.Expires, "expired on"},
		"before it was": {f.Created.Add(-6 * time.Minute), "check the clock"},
	} {
		if _, err := f.Verify(ca.pool(), test.at); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
	}
	if _, err := f.Verify(ca.pool(), f.Created.Add(-4*time.Minute)); err != nil {
		t.Errorf("with a clock that is 4 minutes behind: %v", err)
	}
	if _, _, err := s.Sign(derive(t, newKEK(), "team-a", 1).Public(), time.Now(), 25*time.Hour); err == nil {
		t.Error("it outlives its signer's certificate")
	}
	if _, _, err := s.Sign(derive(t, newKEK(), "team-a", 1).Public(), time.Now().Add(48*time.Hour), time.Hour); err == nil {
		t.Error("an expired certificate signs")
	}
}

func TestFileWithAPrivateKeyIsNamed(t *testing.T) {
	fipstest.Refused(t, fipstest.HPKE)
	name := filepath.Join(t.TempDir(), "a.pub")
	if err := os.WriteFile(name, []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadFile(name); err == nil || !strings.Contains(err.Error(), "has a private key") {
		t.Error(err)
	}
}

// FuzzFile parses and verifies anything: only what the signer has signed is accepted.
func FuzzFile(f *testing.F) {
	fipstest.Refused(f, fipstest.HPKE)
	ca := newAuthority(f, nil, nil)
	want, text := signed(f, ca.signer(f, nil, nil), 23*time.Hour)
	roots := ca.pool()
	f.Add(text)
	f.Add(bytes.ReplaceAll(text, []byte("\n"), []byte("\r\n")))
	f.Add(text[:len(text)/2])
	f.Add([]byte("-----BEGIN PILOT PUBLIC KEY-----\nKEK: a\n\n-----END PILOT PUBLIC KEY-----\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		key, err := verified(b, roots)
		if err == nil && (key.ID != want.ID || key.Version != want.Version || !bytes.Equal(key.Bytes(), want.Bytes())) {
			t.Errorf("accepted, for %s version %d", key.ID, key.Version)
		}
	})
}

func pemCertificate(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

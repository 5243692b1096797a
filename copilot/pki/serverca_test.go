package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/internal/certfile"
)

func newServerCA(t *testing.T, hosts ...string) (dir, certFile, keyFile string) {
	t.Helper()
	dir = t.TempDir()
	if err := CreateServerCA(dir, hosts, 1000*time.Hour, nil); err != nil {
		t.Fatal(err)
	}
	return dir, filepath.Join(dir, ServerCACertFile), filepath.Join(dir, ServerCAKeyFile)
}

// verify verifies a server's certificate as its clients do.
func verify(t *testing.T, cert *tls.Certificate, caFile, host string) error {
	t.Helper()
	pool, err := certfile.Pool(caFile)
	if err != nil {
		t.Fatal(err)
	}
	_, err = cert.Leaf.Verify(x509.VerifyOptions{Roots: pool, DNSName: host, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	return err
}

func TestServerCAIssuesForItsHosts(t *testing.T) {
	for _, hosts := range [][]string{
		{"copilot.example.com"}, {"192.0.2.1"}, {"2001:db8::1"}, {"10.96.0.200", "copilot.copilot-system.svc", "2001:db8::1"},
	} {
		_, certFile, keyFile := newServerCA(t, hosts...)
		shown, err := Served(certFile, keyFile)
		if err != nil {
			t.Fatal(err)
		}
		for _, host := range hosts {
			if err := verify(t, shown(), certFile, host); err != nil {
				t.Errorf("%v: %s: %v", hosts, host, err)
			}
		}
		if first := shown(); shown() != first {
			t.Errorf("%v: each connection has another certificate", hosts)
		}
	}
}

// TestServerCAIsLimitedToItsHosts has somebody who has the CA's key sign other certificates.
func TestServerCAIsLimitedToItsHosts(t *testing.T) {
	for _, hosts := range [][]string{{"copilot.example.com"}, {"192.0.2.1"}, {"copilot.example.com", "192.0.2.1"}} {
		_, certFile, keyFile := newServerCA(t, hosts...)
		ca, err := LoadFiles(certFile, keyFile)
		if err != nil {
			t.Fatal(err)
		}
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		issue := func(template x509.Certificate) *tls.Certificate {
			t.Helper()
			der, err := sign(&template, ca.cert, key.Public(), ca.key, time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			leaf, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			return &tls.Certificate{Leaf: leaf}
		}
		for _, host := range []string{"other.example.com", "192.0.2.2", "2001:db8::2"} {
			template := x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
			if ip := net.ParseIP(host); ip != nil {
				template.IPAddresses = []net.IP{ip}
			} else {
				template.DNSNames = []string{host}
			}
			if err := verify(t, issue(template), certFile, host); err == nil {
				t.Errorf("a CA for %v issued a certificate for %s", hosts, host)
			}
		}
		pool, err := certfile.Pool(certFile)
		if err != nil {
			t.Fatal(err)
		}
		client := issue(x509.Certificate{
			URIs:        []*url.URL{{Scheme: "spiffe", Host: "example.com", Path: "/admin"}},
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		})
		if _, err := client.Leaf.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err == nil {
			t.Errorf("a CA for %v issued a client's certificate", hosts)
		}
	}
}

func TestServedCertificateIsRenewedInTime(t *testing.T) {
	_, certFile, keyFile := newServerCA(t, "copilot.example.com")
	pair, err := certfile.Load(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	s := &served{pair: pair, file: certFile}
	now := time.Now()
	at := func(later time.Duration) *tls.Certificate {
		t.Helper()
		cert, err := s.current(now.Add(later))
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	first := at(0)
	if at(servedFor/2) != first {
		t.Error("it was renewed when half of its time was left")
	}
	second := at(servedFor * 7 / 10)
	if second == first {
		t.Error("it was not renewed when less than a third of its time was left")
	}
	// The CA itself has expired.
	if cert, err := s.current(now.Add(1001 * time.Hour)); err == nil || cert != second {
		t.Errorf("an expired CA issued %v: %v", cert, err)
	}
	if last := at(999 * time.Hour).Leaf; last.NotAfter.After(pair.Certificate().Leaf.NotAfter) {
		t.Errorf("it is valid until %s, after its CA", last.NotAfter)
	}
	// It is replaced while copilot runs.
	_, newCert, newKey := newServerCA(t, "copilot.example.com")
	for from, to := range map[string]string{newCert: certFile, newKey: keyFile} {
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	if err := verify(t, at(0), certFile, "copilot.example.com"); err != nil {
		t.Errorf("by the new CA: %v", err)
	}
}

func TestServedCertificateOfAFile(t *testing.T) {
	dir := t.TempDir()
	ca, err := Create(dir, "example.com", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile := filepath.Join(dir, "server.pem"), filepath.Join(dir, "server-key.pem")
	if err := ca.IssueServer([]string{"copilot.example.com"}, time.Minute, certFile, keyFile, nil); err != nil {
		t.Fatal(err)
	}
	shown, err := Served(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	if want, err := ReadCertificate(certFile); err != nil || !shown().Leaf.Equal(want) {
		t.Errorf("another certificate is shown than that in the file: %v", err)
	}
	// A CA for clients' certificates would issue ones for any server.
	if _, err := Served(filepath.Join(dir, CertFile), filepath.Join(dir, KeyFile)); err == nil || !strings.Contains(err.Error(), "copilot certs server-ca") {
		t.Errorf("a CA without hosts: %v", err)
	}
}

// TestServedSelfSignedCertificate has one as OpenSSL makes it, which is a CA's too.
func TestServedSelfSignedCertificate(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := sign(&x509.Certificate{Subject: pkix.Name{CommonName: "copilot"}, DNSNames: []string{"copilot.example.com"}, IsCA: true, BasicConstraintsValid: true}, nil, key.Public(), key, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "server.pem"), filepath.Join(dir, "server-key.pem")
	if err := writePair(certFile, der, keyFile, key, nil); err != nil {
		t.Fatal(err)
	}
	shown, err := Served(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	if string(shown().Certificate[0]) != string(der) {
		t.Error("another certificate is shown than that in the file")
	}
}

func TestServerCAIsAddedToTheCAFile(t *testing.T) {
	dir := t.TempDir()
	if _, err := Create(dir, "example.com", time.Hour); err != nil {
		t.Fatal(err)
	}
	create := func() error { return CreateServerCA(dir, []string{"copilot.example.com"}, time.Hour, nil) }
	if err := create(); err != nil {
		t.Fatal(err)
	}
	shown, err := Served(filepath.Join(dir, ServerCACertFile), filepath.Join(dir, ServerCAKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := verify(t, shown(), filepath.Join(dir, CertFile), "copilot.example.com"); err != nil {
		t.Errorf("by ca.pem: %v", err)
	}
	if ca, err := Load(dir); err != nil || ca.TrustDomain() != "example.com" {
		t.Errorf("the CA for clients: %v", err)
	}
	if err := create(); err == nil || !strings.Contains(err.Error(), "already exists") {
		t.Errorf("made again: %v", err)
	}
	if b, _ := os.ReadFile(filepath.Join(dir, CertFile)); strings.Count(string(b), "BEGIN CERTIFICATE") != 2 {
		t.Errorf("ca.pem:\n%s", b)
	}
}

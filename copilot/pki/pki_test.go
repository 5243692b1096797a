package pki

import (
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func certificate(t *testing.T, name string) *x509.Certificate {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestIssue(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	ca, err := Create(dir, "example.com", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if err := ca.IssueServer([]string{"copilot.example.com", "10.0.0.1"}, time.Hour/2, in("server.pem"), in("server-key.pem"), nil); err != nil {
		t.Fatal(err)
	}
	if err := ca.IssueClient(Client{"node/worker-7", time.Minute}, in("node.pem"), in("node-key.pem")); err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(certificate(t, in(CertFile)))
	verify := func(name, host string, usage x509.ExtKeyUsage) error {
		_, err := certificate(t, in(name)).Verify(x509.VerifyOptions{Roots: roots, DNSName: host, KeyUsages: []x509.ExtKeyUsage{usage}})
		return err
	}
	for _, test := range []struct {
		name, host string
		usage      x509.ExtKeyUsage
		ok         bool
	}{
		{"server.pem", "copilot.example.com", x509.ExtKeyUsageServerAuth, true},
		{"server.pem", "10.0.0.1", x509.ExtKeyUsageServerAuth, true},
		{"server.pem", "other.example.com", x509.ExtKeyUsageServerAuth, false},
		{"server.pem", "", x509.ExtKeyUsageClientAuth, false},
		{"node.pem", "", x509.ExtKeyUsageClientAuth, true},
		{"node.pem", "", x509.ExtKeyUsageServerAuth, false},
	} {
		if err := verify(test.name, test.host, test.usage); (err == nil) != test.ok {
			t.Errorf("%+v: %v", test, err)
		}
	}
	node := certificate(t, in("node.pem"))
	if len(node.URIs) != 1 || node.URIs[0].String() != "spiffe://example.com/node/worker-7" || node.IsCA || time.Until(node.NotAfter) > time.Minute {
		t.Errorf("%v until %s", node.URIs, node.NotAfter)
	}
	for _, name := range []string{KeyFile, "server-key.pem", "node-key.pem"} {
		if info, err := os.Stat(in(name)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	for path, want := range map[string]string{
		"node/..": "only dots", "node/": "can't be", "/node": "can't be", "node//a": "can't be", "a b": "can't be", "é": "can't be", "a%2fb": "can't be", "": "can't be",
	} {
		if _, err := ca.ID(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", path, err)
		}
	}
	if err := ca.IssueClient(Client{"node/a", time.Minute}, in("node.pem"), in("x-key.pem")); err == nil || !strings.Contains(err.Error(), "not overwritten") {
		t.Errorf("over a certificate: %v", err)
	}
	if err := ca.IssueClient(Client{"node/a", 2 * time.Hour}, in("a.pem"), in("a-key.pem")); err == nil || !strings.Contains(err.Error(), "valid only until") {
		t.Errorf("longer than the CA: %v", err)
	}
	if _, err := Create(dir, "example.com", time.Hour); err == nil {
		t.Error("a CA was made over another")
	}
	if _, err := Create(t.TempDir(), "Example.com/x", time.Hour); err == nil {
		t.Error("that is no trust domain")
	}
}

func TestLoad(t *testing.T) {
	one, two := t.TempDir(), t.TempDir()
	for _, dir := range []string{one, two} {
		if _, err := Create(dir, "example.com", time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	if ca, err := Load(one); err != nil || ca.TrustDomain() != "example.com" {
		t.Fatal(err)
	}
	key, err := os.ReadFile(filepath.Join(two, KeyFile))
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]struct {
		b    []byte
		want string
	}{
		"another's key": {key, "is not the key of"},
		"no PEM":        {[]byte("x"), "holds no private key in PEM"},
		"no key":        {pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")}), "no PKCS#8 key"},
	} {
		if err := os.WriteFile(filepath.Join(one, KeyFile), content.b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(one); err == nil || !strings.Contains(err.Error(), content.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.WriteFile(filepath.Join(two, CertFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(two); err == nil || !strings.Contains(err.Error(), CertFile+" holds no certificate") {
		t.Errorf("an empty file: %v", err)
	}
	if _, err := Load(t.TempDir()); err == nil {
		t.Error("loaded from an empty directory")
	}
}

package pki

import (
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/internal/certfile"
)

// newTestCA returns a CA, and the directory that it is in.
func newTestCA(t *testing.T, trustDomain string) (*CA, string) {
	t.Helper()
	dir := t.TempDir()
	ca, err := Create(dir, trustDomain, 24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return ca, dir
}

// trust adds the certificate of the CA in other to the file of the CA in dir.
func trust(t *testing.T, dir, other string) {
	t.Helper()
	var both []byte
	for _, d := range []string{dir, other} {
		b, err := os.ReadFile(filepath.Join(d, CertFile))
		if err != nil {
			t.Fatal(err)
		}
		both = append(both, b...)
	}
	if err := os.WriteFile(filepath.Join(dir, CertFile), both, 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestRenewsOnlyItsOwn hands certificates for renewal that somebody else made, as a
// node could that gives the admin a copy of its own.
func TestRenewsOnlyItsOwn(t *testing.T) {
	_, dir := newTestCA(t, "example.com")
	forger, forgerDir := newTestCA(t, "example.com")
	other, otherDir := newTestCA(t, "other.example.com")
	trust(t, dir, otherDir)
	ca, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	in := func(name string) string { return filepath.Join(forgerDir, name) }
	client := func(ca *CA, path, name string) {
		t.Helper()
		if err := ca.IssueClient(Client{path, time.Hour}, in(name), in(name+"-key")); err != nil {
			t.Fatal(err)
		}
	}
	client(forger, "admin", "admin.pem")
	if err := forger.IssueServer([]string{"copilot.example.com"}, time.Hour, in("server.pem"), in("server-key.pem"), nil); err != nil {
		t.Fatal(err)
	}
	// One of a CA that is trusted for another trust domain.
	other.cert.URIs = ca.cert.URIs
	client(other, "admin", "foreign.pem")
	for _, name := range []string{"admin.pem", "server.pem", "foreign.pem"} {
		before, err := os.ReadFile(in(name))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ca.Renew(in(name), "", 0); err == nil || !strings.Contains(err.Error(), "not issued by this CA") {
			t.Errorf("%s: %v", name, err)
		}
		if after, err := os.ReadFile(in(name)); err != nil || string(after) != string(before) {
			t.Errorf("%s was replaced", name)
		}
	}
	client(ca, "node/worker-7", "node.pem")
	if _, err := ca.Renew(in("node.pem"), "", 0); err != nil {
		t.Error(err)
	}
}

// TestRenewKeepsKeyInFile refuses a file in which more than the certificate would be
// replaced.
func TestRenewKeepsKeyInFile(t *testing.T) {
	ca, dir := newTestCA(t, "example.com")
	in := func(name string) string { return filepath.Join(dir, name) }
	if err := ca.IssueClient(Client{"node/worker-7", time.Hour}, in("node.pem"), in("node-key.pem")); err != nil {
		t.Fatal(err)
	}
	cert, err := os.ReadFile(in("node.pem"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(in("node-key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	both := append(cert, key...)
	if err := os.WriteFile(in("both.pem"), both, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Renew(in("both.pem"), "", 0); err == nil || !strings.Contains(err.Error(), "more than one certificate (PRIVATE KEY)") {
		t.Error(err)
	}
	if after, err := os.ReadFile(in("both.pem")); err != nil || string(after) != string(both) {
		t.Error("it was replaced")
	}
}

// TestRotateKeepsTrust replaces a CA twice before the certificates of the first are
// renewed, beside a CA of another trust domain.
func TestRotateKeepsTrust(t *testing.T) {
	ca, dir := newTestCA(t, "example.com")
	_, otherDir := newTestCA(t, "other.example.com")
	trust(t, dir, otherDir)
	in := func(name string) string { return filepath.Join(dir, name) }
	if err := ca.IssueClient(Client{"node/worker-7", time.Hour}, in("node.pem"), in("node-key.pem")); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := Rotate(dir, 24*time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	trusted := func() (n int, err error) {
		certs, err := certfile.Certificates(in(CertFile))
		if err != nil {
			return 0, err
		}
		pool := x509.NewCertPool()
		for _, c := range certs {
			pool.AddCert(c)
		}
		_, err = certificate(t, in("node.pem")).Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		return len(certs), err
	}
	if n, err := trusted(); err != nil || n != 4 {
		t.Errorf("after two rotations: %d CAs, %v", n, err)
	}
	// The CA of an issuer of tokens, say, which no rotation concerns.
	inUse := []string{in("node.pem"), filepath.Join(otherDir, CertFile)}
	if _, err := DropOld(dir, inUse); err == nil || !strings.Contains(err.Error(), "node.pem was not issued by the new CA") {
		t.Errorf("finished with a certificate of the first CA in use: %v", err)
	}
	ca, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Renew(in("node.pem"), "", 0); err != nil {
		t.Fatal(err)
	}
	if n, err := DropOld(dir, inUse); err != nil || n != 2 {
		t.Errorf("finished: %d, %v", n, err)
	}
	if n, err := trusted(); err != nil || n != 2 {
		t.Errorf("after it: %d CAs, %v", n, err)
	}
	if n, err := DropOld(dir, inUse); err != nil || n != 0 {
		t.Errorf("finished again: %d, %v", n, err)
	}
}

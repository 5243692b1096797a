package pki

import (
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/internal/certfile"
)

// TestNodeCAIssuesNoServers has a CA for nodes issue what it must not: nobody who trusts
// the file of the CA takes it, and no CA renews it.
func TestNodeCAIssuesNoServers(t *testing.T) {
	_, dir := newTestCA(t, "example.com")
	in := func(name string) string { return filepath.Join(dir, name) }
	if err := RotateNodeCA(dir, 24*time.Hour, func(*os.File) error { return nil }); err != nil {
		t.Fatal(err)
	}
	node, err := LoadFiles(in(NodeCertFile), in(NodeKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := node.IssueServer([]string{"copilot.example.com"}, time.Hour, in("server.pem"), in("server-key.pem"), nil); err != nil {
		t.Fatal(err)
	}
	if err := node.IssueClient(Client{"node/worker-7", time.Hour}, in("node.pem"), in("node-key.pem")); err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	all, err := certfile.Certificates(in(CertFile))
	if err != nil || len(all) != 2 {
		t.Fatalf("%d CAs, %v", len(all), err)
	}
	for _, c := range all {
		pool.AddCert(c)
	}
	verify := func(name string, usage x509.ExtKeyUsage) error {
		_, err := certificate(t, in(name)).Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{usage}})
		return err
	}
	if err := verify("server.pem", x509.ExtKeyUsageServerAuth); err == nil {
		t.Error("a server's certificate of a CA for nodes is accepted")
	}
	if err := verify("node.pem", x509.ExtKeyUsageClientAuth); err != nil {
		t.Errorf("a node's: %v", err)
	}
	ca, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Renew(in("server.pem"), "", 0); err == nil {
		t.Error("the CA renews it")
	}
	if _, err := ca.Renew(in("node.pem"), "", 0); err != nil {
		t.Errorf("the CA does not renew a node's: %v", err)
	}
	// The CA before it goes, and the other CA stays.
	if err := RotateNodeCA(dir, 24*time.Hour, func(*os.File) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if n, err := DropOld(dir, nil); err != nil || n != 0 {
		t.Errorf("the CA drops %d CAs for nodes, %v", n, err)
	}
	if n, err := DropOldNodeCAs(dir); err != nil || n != 1 {
		t.Errorf("%d CAs for nodes dropped, %v", n, err)
	}
	if all, err := certfile.Certificates(in(CertFile)); err != nil || len(all) != 2 || !all[0].Equal(ca.cert) {
		t.Errorf("%d CAs are left, %v", len(all), err)
	}
}

// TestRotateNodeCAReplacesEmptyFile: a power cut may leave the certificate's file empty.
func TestRotateNodeCAReplacesEmptyFile(t *testing.T) {
	_, dir := newTestCA(t, "example.com")
	certFile, keyFile := filepath.Join(dir, NodeCertFile), filepath.Join(dir, NodeKeyFile)
	if err := os.WriteFile(certFile, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadFiles(certFile, keyFile); !errors.Is(err, certfile.ErrNoCertificate) {
		t.Errorf("load: %v", err)
	}
	if err := RotateNodeCA(dir, time.Hour, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadFiles(certFile, keyFile); err != nil {
		t.Error(err)
	}
}

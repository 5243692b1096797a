//go:build unix

package certfile

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestReplacePairCutShort loads a pair at each point at which replacing it can be cut
// short.
func TestReplacePairCutShort(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	write := func(name string, b []byte) {
		t.Helper()
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(when string, serial int64) {
		t.Helper()
		p, err := Load(certFile, keyFile)
		if err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		if got := p.Certificate().Leaf.SerialNumber.Int64(); got != serial {
			t.Errorf("%s: certificate %d, want %d", when, got, serial)
		}
	}
	cert1, key1 := newPair(t, 1)
	write(certFile, cert1)
	write(keyFile, key1)
	cert2, key2 := newPair(t, 2)
	if err := ReplacePair(certFile, keyFile, cert2, slices.Clone(key2)); err != nil {
		t.Fatal(err)
	}
	expect("replaced", 2)
	write(certFile, cert1)
	expect("between the two", 2)
	if err := CompletePair(certFile, keyFile); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(certFile); err != nil || string(b) != string(cert2) {
		t.Errorf("completed: %s %v", b, err)
	}
	// Somebody else replaces both, the certificate first.
	cert3, key3 := newPair(t, 3)
	write(certFile, cert3)
	expect("half replaced by hand", 2)
	if err := CompletePair(certFile, keyFile); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(certFile); err != nil || string(b) != string(cert3) {
		t.Error("CompletePair took back what somebody has put there")
	}
	write(keyFile, key3)
	expect("replaced by hand", 3)
	write(certFile, cert1)
	if err := CompletePair(certFile, keyFile); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(certFile); err != nil || string(b) != string(cert1) {
		t.Error("CompletePair took a key alone for a pair")
	}
	// Both in one file.
	write(certFile, append(slices.Clone(cert1), key1...))
	keyFile = certFile
	if err := ReplacePair(certFile, keyFile, cert2, slices.Clone(key2)); err != nil {
		t.Fatal(err)
	}
	expect("in one file", 2)
}

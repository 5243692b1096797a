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

// TestLinkOfAnother replaces files by names that another user has chosen where to lead.
func TestLinkOfAnother(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("takes root")
	}
	const other = 65534
	dir, theirs := t.TempDir(), filepath.Join(t.TempDir(), "theirs")
	target, link := filepath.Join(dir, "target"), filepath.Join(theirs, "key.pem")
	replace := func(name string) error {
		r, err := Prepare(name, []byte("new"))
		if err != nil {
			return err
		}
		defer r.Discard()
		return r.Commit()
	}
	for _, err := range []error{os.Mkdir(theirs, 0o755), os.WriteFile(target, []byte("old"), 0o644), os.Symlink(target, link)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := replace(link); err != nil {
		t.Errorf("root's link: %v", err)
	}
	os.WriteFile(target, []byte("old"), 0o644)
	for _, of := range []string{link, theirs} {
		if err := os.Lchown(of, other, other); err != nil {
			t.Fatal(err)
		}
		if err := replace(link); err == nil {
			t.Errorf("with another user's %s it is followed", of)
		}
		if b, _ := os.ReadFile(target); string(b) != "old" {
			t.Errorf("root's file has %q now", b)
		}
		os.Lchown(link, 0, 0)
	}
	// To what is theirs.
	if err := os.Chown(target, other, other); err != nil {
		t.Fatal(err)
	}
	if err := replace(link); err != nil {
		t.Errorf("their own file: %v", err)
	}
	if info, err := os.Stat(target); err != nil || userOf(info) != other || info.Mode().Perm() != 0o644 {
		t.Errorf("%v %v", info, err)
	}
	for _, d := range []string{dir, theirs} {
		if left, _ := filepath.Glob(filepath.Join(d, ".*")); len(left) != 0 {
			t.Errorf("left: %q", left)
		}
	}
}

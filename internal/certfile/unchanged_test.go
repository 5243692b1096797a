package certfile

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/internal/filestamp"
)

// TestFilesAreParsedAgainOnlyAfterAChange replaces files several times within the
// resolution of their times, and once after they have settled.
func TestFilesAreParsedAgainOnlyAfterAChange(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	write := func(name string, b []byte) {
		t.Helper()
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	replace := func(serial int64) {
		cert, key := newPair(t, serial)
		write(certFile, cert)
		write(keyFile, key)
	}
	replace(1)
	p, err := Load(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	cas, err := LoadAuthorities(certFile)
	if err != nil {
		t.Fatal(err)
	}
	for serial := int64(2); serial < 20; serial++ {
		pool := cas.Pool()
		replace(serial)
		if got := p.Certificate().Leaf.SerialNumber.Int64(); got != serial {
			t.Fatalf("certificate %d, want %d", got, serial)
		}
		if cas.Pool() == pool {
			t.Fatalf("the CA is still that before %d", serial)
		}
	}
	time.Sleep(filestamp.Settle + 50*time.Millisecond)
	settled, pool := p.Certificate(), cas.Pool()
	if p.Certificate() != settled || cas.Pool() != pool {
		t.Error("files that did not change were parsed again")
	}
	replace(20)
	if got := p.Certificate().Leaf.SerialNumber.Int64(); got != 20 || cas.Pool() == pool {
		t.Errorf("certificate %d, another CA: %t", got, cas.Pool() != pool)
	}
}

package processor

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"testing"

	"github.com/containers/ocicrypt/utils"

	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// TestWrongPasswordOfSEC1 takes a wrong password that leaves a valid padding, as one in 256
// does: the file's format has no other check.
func TestWrongPasswordOfSEC1(t *testing.T) {
	fipstest.Refused(t, fipstest.PrivateKey)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	//lint:ignore SA1019 OpenSSL still writes such files
	block, err := x509.EncryptPEMBlock(rand.Reader, "EC PRIVATE KEY", der, []byte("secret"), x509.PEMCipherAES256)
	if err != nil {
		t.Fatal(err)
	}
	file := pem.EncodeToMemory(block)
	padded := 0
	for i := range 20_000 {
		wrong := fmt.Appendf(nil, "wrong %d", i)
		//lint:ignore SA1019 OpenSSL still writes such files
		if _, err := x509.DecryptPEMBlock(block, wrong); err == nil {
			padded++
		} else if i > 0 {
			continue
		}
		if _, err := NormalizePrivateKey(file, wrong); !errors.Is(err, errKeyDamaged) {
			t.Fatalf("the password %q: %v", wrong, err)
		}
	}
	if padded == 0 {
		t.Error("no wrong password left a valid padding")
	}
}

// FuzzNormalizePrivateKey: what it returns, ocicrypt reads.
func FuzzNormalizePrivateKey(f *testing.F) {
	fipstest.Refused(f, fipstest.PrivateKey)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), "")
	//lint:ignore SA1019 OpenSSL still writes such files
	legacy, err := x509.EncryptPEMBlock(rand.Reader, "EC PRIVATE KEY", der, []byte("secret"), x509.PEMCipherAES256)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(pem.EncodeToMemory(legacy), "secret")
	// openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -aes256 -pass pass:secret
	f.Add([]byte(`-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAgfsqujG7MqLwICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoEEAgsrD79GvNEQIv7aOG/JucEgZA1
Obj2tIV0CruqUglmIiy0H3BlUajlrJF2QEUskr8LEGKNN9i3iyIGguMj1rf1JUNB
QfT0EQ56IeTNsPkweVygGd6wv0ZarKArTAyTIi6UdL7JPZFtuyej27QgXb8qLApG
i9JtyM4RM2VSBWUXfrdArd6eWY30gLNLbCg4QYtiMBc07jnwv0UjMShrmCPMpzk=
-----END ENCRYPTED PRIVATE KEY-----
`), "secret")
	f.Fuzz(func(t *testing.T, b []byte, password string) {
		key, err := NormalizePrivateKey(b, []byte(password))
		if key == nil && err == nil && NeedsNormalizing(b) {
			t.Error("neither a key nor an error")
		}
		if key == nil {
			return
		}
		if _, err := utils.ParsePrivateKey(key, nil, ""); err != nil || NeedsNormalizing(key) {
			t.Errorf("ocicrypt does not read it: %v", err)
		}
	})
}

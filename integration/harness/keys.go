package harness

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// KeyPair makes a private key in a directory of its own, and its public key.
func KeyPair(t testing.TB, dir string) (private, public string) {
	t.Helper()
	private, public = filepath.Join(dir, "private", "key.pem"), filepath.Join(dir, "public.pem")
	if err := os.MkdirAll(filepath.Dir(private), 0o700); err != nil {
		t.Fatal(err)
	}
	Output(t, Command(t, "openssl", "genrsa", "-out", private, "2048"))
	Output(t, Command(t, "openssl", "rsa", "-in", private, "-pubout", "-out", public))
	return private, public
}

// ECKeyPairs makes key pairs and returns their private and public keys' files.
func ECKeyPairs(t testing.TB, dir string, n int) (private, public []string) {
	t.Helper()
	for i := range n {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		pub, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		priv, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		private = append(private, Write(t, fmt.Sprintf("%s/%d.pem", dir, i), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: priv}))))
		public = append(public, Write(t, fmt.Sprintf("%s/%d.pub", dir, i), string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pub}))))
	}
	return private, public
}

// ImportHSMKey puts a private key into a new token of SoftHSM and returns the YAML
// file that says where it is.
func ImportHSMKey(t testing.TB, dir, private string) string {
	t.Helper()
	if err := os.MkdirAll(dir+"/tokens", 0o700); err != nil {
		t.Fatal(err)
	}
	conf := Write(t, dir+"/softhsm2.conf", "directories.tokendir = "+dir+"/tokens\nobjectstore.backend = file\n")
	t.Setenv("SOFTHSM2_CONF", conf)
	t.Setenv("OCICRYPT_CONFIG", "internal")
	// SoftHSM knows no other hash for OAEP.
	t.Setenv("OCICRYPT_OAEP_HASHALG", "sha1")
	Output(t, Command(t, "openssl", "pkcs8", "-topk8", "-nocrypt", "-in", private, "-out", dir+"/key.p8"))
	Output(t, Command(t, "softhsm2-util", "--init-token", "--free", "--label", "pilot", "--pin", "1234", "--so-pin", "1234"))
	Output(t, Command(t, "softhsm2-util", "--import", dir+"/key.p8", "--token", "pilot", "--label", "image", "--id", "a1", "--pin", "1234"))
	return Write(t, dir+"/key.yaml", "pkcs11:\n  uri: pkcs11:token=pilot;id=%A1;object=image;type=private?pin-value=1234&module-name=softhsm2\nmodule:\n  env:\n    SOFTHSM2_CONF: "+conf+"\n")
}

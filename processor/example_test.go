package processor_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log"
	"strings"

	"github.com/containers/ocicrypt/config"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// Encrypt a layer for a public key, and decrypt it with the private key.
func Example() {
	ctx := context.Background()
	private, public := newKeyPair()

	var encrypted bytes.Buffer
	to := processor.Recipients{Parameters: map[string][][]byte{"pubkeys": {public}}}
	desc, err := processor.Encrypt(ctx, &encrypted, strings.NewReader("a layer"), ocispec.MediaTypeImageLayer, to)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(desc.MediaType)

	keys := processor.Keys{Private: &config.DecryptConfig{Parameters: map[string][][]byte{
		"privkeys": {private}, "privkeys-passwords": {nil},
	}}}
	var plain bytes.Buffer
	if err := processor.Decrypt(ctx, &plain, bytes.NewReader(encrypted.Bytes()), desc, keys); err != nil {
		log.Fatal(err)
	}
	fmt.Println(plain.String())

	encrypted.Bytes()[0] ^= 1
	err = processor.Decrypt(ctx, &plain, &encrypted, desc, keys)
	fmt.Println(errors.Is(err, processor.ErrTampered))
	// Output:
	// application/vnd.oci.image.layer.v1.tar+encrypted
	// a layer
	// true
}

// newKeyPair returns an EC key and its public key in PEM.
func newKeyPair() (private, public []byte) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		log.Fatal(err)
	}
	if private, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
		log.Fatal(err)
	}
	if public, err = x509.MarshalPKIXPublicKey(&key.PublicKey); err != nil {
		log.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})
}

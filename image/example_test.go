package image_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containers/ocicrypt/config"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/processor"
)

// Encrypt an image in a directory for a public key, and decrypt it with the private key.
func Example() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "example-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	store, err := local.NewStore(dir)
	if err != nil {
		log.Fatal(err)
	}
	plain := writeImage(ctx, store)
	private, public := newKeyPair()

	to := processor.Recipients{Parameters: map[string][][]byte{"pubkeys": {public}}}
	encrypted, err := image.Encrypt(ctx, store, plain, to, image.Options{})
	if err != nil {
		log.Fatal(err)
	}
	for _, p := range encrypted.Plain {
		fmt.Println("readable:", p.Reason)
	}
	layers, err := image.Layers(ctx, store, encrypted.Target, image.Options{})
	if err != nil {
		log.Fatal(err)
	}
	for _, l := range layers {
		fmt.Println(l.Descriptor.MediaType, image.Recipients(l.Descriptor))
	}

	keys := processor.Keys{Private: &config.DecryptConfig{Parameters: map[string][][]byte{
		"privkeys": {private}, "privkeys-passwords": {nil},
	}}}
	decrypted, err := image.Decrypt(ctx, store, encrypted.Target, keys, image.Options{})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("the same image:", decrypted.Target.Digest == plain.Digest)
	// Output:
	// readable: config
	// application/vnd.oci.image.layer.v1.tar+encrypted [jwe]
	// the same image: true
}

// Encrypt nothing if something would stay readable, such as a layer that is only on its
// publisher's server.
func ExampleEncrypt_plain() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "example-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	store, err := local.NewStore(dir)
	if err != nil {
		log.Fatal(err)
	}
	elsewhere := ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("somewhere else"), Size: 14,
		URLs: []string{"https://example.com/layer"},
	}
	target := writeImage(ctx, store, elsewhere)
	_, public := newKeyPair()
	to := processor.Recipients{Parameters: map[string][][]byte{"pubkeys": {public}}}

	_, err = image.Encrypt(ctx, store, target, to, image.Options{})
	var plain *image.PlainError
	if errors.As(err, &plain) {
		fmt.Println("refused:", plain.Plain[0].Reason, plain.Plain[0].URLs)
	}
	result, err := image.Encrypt(ctx, store, target, to, image.Options{AllowPlain: true})
	fmt.Println(result.Layers, "layer encrypted,", err)
	// Output:
	// refused: foreign [https://example.com/layer]
	// 1 layer encrypted, <nil>
}

// writeImage writes an image of one layer, and of those that are elsewhere.
func writeImage(ctx context.Context, store content.Store, more ...ocispec.Descriptor) ocispec.Descriptor {
	write := func(mediaType, text string) ocispec.Descriptor {
		desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromString(text), Size: int64(len(text))}
		if err := content.WriteBlob(ctx, store, desc.Digest.String(), strings.NewReader(text), desc); err != nil {
			log.Fatal(err)
		}
		return desc
	}
	manifest, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: write(ocispec.MediaTypeImageConfig, `{"architecture":"amd64","os":"linux"}`),
		Layers: append([]ocispec.Descriptor{write(ocispec.MediaTypeImageLayer, "a layer")}, more...),
	})
	if err != nil {
		log.Fatal(err)
	}
	return write(ocispec.MediaTypeImageManifest, string(manifest))
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
	return private, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})
}

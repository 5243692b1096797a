package harness

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"testing"

	"github.com/containers/ocicrypt/blockcipher"

	"github.com/ctrlplane/pilot/processor"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
	"github.com/ctrlplane/pilot/processor/ocicryptclient/grpcdial"
)

// The annotations of an encrypted layer.
const (
	KeyAnnotation    = "org.opencontainers.image.enc.keys.provider.pilot"
	PublicAnnotation = "org.opencontainers.image.enc.pubopts"
)

// Providers returns the key providers that an ocicrypt.conf names.
func Providers(t testing.TB, ocicrypt string) processor.Keys {
	t.Helper()
	found, err := ocicryptclient.FromFile(ocicrypt, grpcdial.Call)
	if err != nil {
		t.Fatal(err)
	}
	return processor.Keys{Providers: found}
}

// EncryptUnder encrypts a plain layer with the key that was wrapped for another one, as
// somebody can who may decrypt that. It returns the layer's annotations, and what was
// wrapped with the key.
func EncryptUnder(t testing.TB, keys processor.Keys, wrapped string, plain []byte) (ciphertext []byte, annotations map[string]string, private blockcipher.PrivateLayerBlockCipherOptions) {
	t.Helper()
	annotation, err := base64.StdEncoding.DecodeString(wrapped)
	if err != nil {
		t.Fatal(err)
	}
	b, err := keys.Providers["pilot"].UnwrapKey(t.Context(), nil, annotation)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &private); err != nil {
		t.Fatal(err)
	}
	block, err := aes.NewCipher(private.SymmetricKey)
	if err != nil {
		t.Fatal(err)
	}
	ciphertext = make([]byte, len(plain))
	cipher.NewCTR(block, private.CipherOptions["nonce"]).XORKeyStream(ciphertext, plain)
	mac := hmac.New(sha256.New, private.SymmetricKey)
	mac.Write(ciphertext)
	public, err := json.Marshal(blockcipher.PublicLayerBlockCipherOptions{CipherType: blockcipher.AES256CTR, Hmac: mac.Sum(nil), CipherOptions: map[string][]byte{}})
	if err != nil {
		t.Fatal(err)
	}
	return ciphertext, map[string]string{KeyAnnotation: wrapped, PublicAnnotation: base64.StdEncoding.EncodeToString(public)}, private
}

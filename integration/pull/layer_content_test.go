package pull

import (
	"bytes"
	"compress/gzip"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"io"
	"testing"

	"github.com/containers/ocicrypt/blockcipher"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/processor"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
	"github.com/ctrlplane/pilot/processor/ocicryptclient/grpcdial"
)

const (
	providerAnnotation = "org.opencontainers.image.enc.keys.provider.pilot"
	publicAnnotation   = "org.opencontainers.image.enc.pubopts"
)

// providers returns the key provider of the machine that encrypts, which may unwrap, too.
func providers(c *harness.CI) map[string]processor.KeyProvider {
	c.T.Helper()
	found, err := ocicryptclient.FromFile(c.Ocicrypt, grpcdial.Call)
	if err != nil {
		c.T.Fatal(err)
	}
	return found
}

// forge makes an image beside another, in its repository, of the plain layers that evil has.
// They are encrypted with the keys of that image's layers, as somebody can who may decrypt
// it, and what was wrapped with a KEK is that image's. If also is a KEK, the same keys are
// wrapped for that before, with the digests of the new layers.
func forge(c *harness.CI, image, evil, suffix, also string) string {
	c.T.Helper()
	provider := providers(c)["pilot"]
	return replaced(c, image, evil, suffix, func(original ocispec.Descriptor, plain []byte) (out []byte, annotations map[string]string) {
		wrapped, err := base64.StdEncoding.DecodeString(original.Annotations[providerAnnotation])
		if err != nil {
			c.T.Fatal(err)
		}
		b, err := provider.UnwrapKey(c.T.Context(), nil, wrapped)
		if err != nil {
			c.T.Fatal(err)
		}
		var private blockcipher.PrivateLayerBlockCipherOptions
		if err := json.Unmarshal(b, &private); err != nil {
			c.T.Fatal(err)
		}
		block, err := aes.NewCipher(private.SymmetricKey)
		if err != nil {
			c.T.Fatal(err)
		}
		out = make([]byte, len(plain))
		cipher.NewCTR(block, private.CipherOptions["nonce"]).XORKeyStream(out, plain)
		mac := hmac.New(sha256.New, private.SymmetricKey)
		mac.Write(out)
		public, err := json.Marshal(blockcipher.PublicLayerBlockCipherOptions{CipherType: blockcipher.AES256CTR, Hmac: mac.Sum(nil), CipherOptions: map[string][]byte{}})
		if err != nil {
			c.T.Fatal(err)
		}
		annotations = map[string]string{providerAnnotation: original.Annotations[providerAnnotation], publicAnnotation: base64.StdEncoding.EncodeToString(public)}
		if also != "" {
			private.Digest = digest.FromBytes(plain)
			again, err := json.Marshal(private)
			if err != nil {
				c.T.Fatal(err)
			}
			own, err := provider.WrapKey(c.T.Context(), [][]byte{[]byte(also)}, again)
			if err != nil {
				c.T.Fatal(err)
			}
			annotations[providerAnnotation] = base64.StdEncoding.EncodeToString(own) + "," + annotations[providerAnnotation]
		}
		return out, annotations
	})
}

// encryptAs makes an image beside another, in its repository, of the plain layers that from
// has, encrypted for team-a by a tool that wraps what named returns as the digest of a plain
// layer.
func encryptAs(c *harness.CI, image, from, suffix string, named func(plain []byte) digest.Digest) string {
	c.T.Helper()
	to := processor.Recipients{Keys: processor.Keys{Providers: providers(c)}, Parameters: map[string][][]byte{"pilot": {[]byte("team-a")}}}
	return replaced(c, image, from, suffix, func(_ ocispec.Descriptor, plain []byte) ([]byte, map[string]string) {
		key := processor.NewLayerKey(named(plain))
		encrypter, err := processor.NewEncrypter(bytes.NewReader(plain), key)
		if err != nil {
			c.T.Fatal(err)
		}
		out, err := io.ReadAll(encrypter)
		if err != nil {
			c.T.Fatal(err)
		}
		annotations, err := key.Wrap(c.T.Context(), to, nil)
		if err != nil {
			c.T.Fatal(err)
		}
		name, public, err := key.PublicOptions()
		if err != nil {
			c.T.Fatal(err)
		}
		annotations[name] = public
		return out, annotations
	})
}

// uncompressed returns the digest of a layer as it is without gzip.
func uncompressed(t *testing.T) func(plain []byte) digest.Digest {
	return func(plain []byte) digest.Digest {
		t.Helper()
		z, err := gzip.NewReader(bytes.NewReader(plain))
		if err != nil {
			t.Fatal(err)
		}
		d, err := digest.FromReader(z)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
}

// replaced makes an image beside another, in its repository, of the configuration of from,
// and of what encrypt makes of each of its plain layers, in the place of a layer of the other.
func replaced(c *harness.CI, image, from, suffix string, encrypt func(original ocispec.Descriptor, plain []byte) ([]byte, map[string]string)) string {
	c.T.Helper()
	var other ocispec.Manifest
	if err := json.Unmarshal([]byte(harness.Read(c.T, c.Blob(c.Digest(from).String()))), &other); err != nil {
		c.T.Fatal(err)
	}
	return c.Edit(image, suffix, func(m *ocispec.Manifest) {
		m.Config = other.Config
		c.Put(image, "_layers", []byte(harness.Read(c.T, c.Blob(other.Config.Digest.String()))))
		for i, l := range other.Layers {
			b, annotations := encrypt(m.Layers[i], []byte(harness.Read(c.T, c.Blob(l.Digest.String()))))
			m.Layers[i] = ocispec.Descriptor{MediaType: l.MediaType + "+encrypted", Digest: c.Put(image, "_layers", b), Size: int64(len(b)), Annotations: annotations}
		}
	})
}

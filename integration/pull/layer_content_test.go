package pull

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"io"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/processor"
)

// forge makes an image beside another, in its repository, of the plain layers that evil has.
// They are encrypted with the keys of that image's layers, as somebody can who may decrypt
// it, and what was wrapped with a KEK is that image's. If also is a KEK, the same keys are
// wrapped for that before, with the digests of the new layers.
func forge(c *harness.CI, image, evil, suffix, also string) string {
	c.T.Helper()
	keys := harness.Providers(c.T, c.Ocicrypt)
	return replaced(c, image, evil, suffix, func(original ocispec.Descriptor, plain []byte) ([]byte, map[string]string) {
		out, annotations, private := harness.EncryptUnder(c.T, keys, original.Annotations[harness.KeyAnnotation], plain)
		if also != "" {
			private.Digest = digest.FromBytes(plain)
			again, err := json.Marshal(private)
			if err != nil {
				c.T.Fatal(err)
			}
			own, err := keys.Providers["pilot"].WrapKey(c.T.Context(), [][]byte{[]byte(also)}, again)
			if err != nil {
				c.T.Fatal(err)
			}
			annotations[harness.KeyAnnotation] = base64.StdEncoding.EncodeToString(own) + "," + annotations[harness.KeyAnnotation]
		}
		return out, annotations
	})
}

// encryptAs makes an image beside another, in its repository, of the plain layers that from
// has, encrypted for team-a by a tool that wraps what named returns as the digest of a plain
// layer.
func encryptAs(c *harness.CI, image, from, suffix string, named func(plain []byte) digest.Digest) string {
	c.T.Helper()
	to := processor.Recipients{Keys: harness.Providers(c.T, c.Ocicrypt), Parameters: map[string][][]byte{"pilot": {[]byte("team-a")}}}
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

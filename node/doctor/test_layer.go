package doctor

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"time"

	"github.com/containerd/platforms"
	"github.com/containers/ocicrypt/config"
	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
	"github.com/ctrlplane/pilot/processor/ocicryptclient/grpcdial"
)

// testFile is the name of the file in a testLayer.
const testFile = "pilot-doctor"

// testLayer is a small encrypted layer.
type testLayer struct {
	desc   ocispec.Descriptor
	blob   []byte
	diffID digest.Digest
	secret []byte // what is in testFile
	// keys decrypt it. Empty if a key provider does.
	keys *config.DecryptConfig
}

// newTestLayer makes a layer that is encrypted for a KEK by the key provider at target, as
// ocicrypt's tools do it, or for a new private key if kek is "".
func newTestLayer(ctx context.Context, provider, target, kek string) (*testLayer, error) {
	l := &testLayer{secret: newSecret(), keys: &config.DecryptConfig{}}
	plain, err := l.pack()
	if err != nil {
		return nil, err
	}
	var recipient processor.Recipients
	if kek != "" {
		client, err := ocicryptclient.New(provider, keyproviderconfig.KeyProviderAttrs{Grpc: target}, grpcdial.Call)
		if err != nil {
			return nil, err
		}
		recipient.Providers = map[string]processor.KeyProvider{provider: client}
		recipient.Parameters = map[string][][]byte{provider: {[]byte(kek)}}
	} else if recipient.Parameters, l.keys.Parameters, err = newRSAKey(); err != nil {
		return nil, err
	}

	var blob bytes.Buffer
	l.desc, err = processor.Encrypt(ctx, &blob, bytes.NewReader(plain), ocispec.MediaTypeImageLayerGzip, recipient)
	l.blob = blob.Bytes()
	if err != nil {
		return nil, err
	}
	return l, nil
}

// newSecret returns 32 random hexadecimal digits.
func newSecret() []byte {
	b := make([]byte, 16)
	rand.Read(b) // never fails
	return []byte(hex.EncodeToString(b))
}

// pack returns the plain layer, and sets the diff ID.
func (l *testLayer) pack() ([]byte, error) {
	layer, err := tarOf(file{testFile, l.secret})
	if err != nil {
		return nil, err
	}
	l.diffID = digest.FromBytes(layer)
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	if _, err := z.Write(layer); err != nil {
		return nil, err
	}
	err = z.Close()
	return packed.Bytes(), err
}

// archive returns the layer in an image for this platform, as an OCI layout in
// a tar archive.
func (l *testLayer) archive() ([]byte, error) {
	files := []file{{blobPath(l.desc.Digest), l.blob}}
	add := func(mediaType string, v any) (ocispec.Descriptor, error) {
		b, err := json.Marshal(v)
		desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
		files = append(files, file{blobPath(desc.Digest), b})
		return desc, err
	}
	platform := platforms.DefaultSpec()
	conf, err := add(ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: platform,
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{l.diffID}},
	})
	if err != nil {
		return nil, err
	}
	manifest, err := add(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: conf, Layers: []ocispec.Descriptor{l.desc},
	})
	if err != nil {
		return nil, err
	}
	manifest.Platform = &platform
	index, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{manifest},
	})
	if err != nil {
		return nil, err
	}
	return tarOf(append(files,
		file{ocispec.ImageLayoutFile, []byte(`{"imageLayoutVersion":"` + ocispec.ImageLayoutVersion + `"}`)},
		file{ocispec.ImageIndexFile, index})...)
}

func blobPath(d digest.Digest) string { return "blobs/" + d.Algorithm().String() + "/" + d.Encoded() }

type file struct {
	name    string
	content []byte
}

func tarOf(files ...file) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		if err := w.WriteHeader(&tar.Header{Name: f.name, Mode: 0o600, Size: int64(len(f.content)), ModTime: time.Now()}); err != nil {
			return nil, err
		}
		if _, err := w.Write(f.content); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return b.Bytes(), err
}

// newRSAKey returns ocicrypt's parameters for a new key pair.
func newRSAKey() (public, private map[string][][]byte, err error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return nil, nil, fmt.Errorf("public key: %w", err)
	}
	public = map[string][][]byte{"pubkeys": {pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})}}
	private = map[string][][]byte{
		"privkeys":           {pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})},
		"privkeys-passwords": {nil},
	}
	return public, private, nil
}

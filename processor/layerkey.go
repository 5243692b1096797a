package processor

import (
	"bytes"
	"crypto/aes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/containers/ocicrypt/blockcipher"
	"github.com/opencontainers/go-digest"
)

// KeySize is the size of a layer key in bytes.
const KeySize = 32

// AnnotationPrefix begins the key of each annotation that says how a layer is
// encrypted. They are removed from a layer's descriptor when it is decrypted.
const AnnotationPrefix = "org.opencontainers.image.enc."

const (
	annotationPubOpts    = AnnotationPrefix + "pubopts"
	annotationKeysPrefix = AnnotationPrefix + "keys."
)

// LayerKey is what decrypts and authenticates one layer. ocicrypt keeps it in two parts:
// the public options, readable in the layer's descriptor, and the private ones, wrapped
// for each recipient.
type LayerKey struct {
	// Digest is the digest of the plain layer, according to the tool that encrypted
	// it. It may be empty. If a tool compressed and encrypted in one step, it is that
	// of the uncompressed layer.
	Digest digest.Digest
	// Sealed is 32 bytes that get wrapped with the key, too, or nil: what the tool that
	// encrypted the layer has sealed of it.
	Sealed []byte
	// OpenedBy is what has unwrapped the key.
	OpenedBy Opener

	key   []byte // KeySize bytes
	nonce []byte // aes.BlockSize bytes
	mac   []byte // sha256.Size bytes, of the ciphertext; nil until there is one
}

// NewLayerKey returns a new random layer key, to encrypt one layer with. plain
// is the digest of that layer, or empty when it is not known; it gets wrapped
// with the key.
func NewLayerKey(plain digest.Digest) *LayerKey {
	secret := make([]byte, KeySize+aes.BlockSize)
	rand.Read(secret) // never fails
	return &LayerKey{Digest: plain, key: secret[:KeySize], nonce: secret[KeySize:]}
}

// WithSealed returns the same key with other bytes in Sealed. [LayerKey.Clear] of either
// clears both.
func (k *LayerKey) WithSealed(sealed []byte) *LayerKey {
	other := *k
	other.Sealed = sealed
	return &other
}

// Clear overwrites the key. The LayerKey is of no use afterwards.
func (k *LayerKey) Clear() {
	clear(k.key)
}

// Equal reports whether both are the key of the same plain layer, so what is wrapped with
// them is the same. It takes the same time whatever the keys are.
func (k *LayerKey) Equal(other *LayerKey) bool {
	same := subtle.ConstantTimeCompare(k.key, other.key) & subtle.ConstantTimeCompare(k.nonce, other.nonce)
	return same == 1 && k.Digest == other.Digest && bytes.Equal(k.Sealed, other.Sealed)
}

// private returns ocicrypt's private options, the secret that gets wrapped.
func (k *LayerKey) private() ([]byte, error) {
	options := map[string][]byte{"nonce": k.nonce}
	if k.Sealed != nil {
		options[sealedOption] = k.Sealed
	}
	return json.Marshal(blockcipher.PrivateLayerBlockCipherOptions{SymmetricKey: k.key, Digest: k.Digest, CipherOptions: options})
}

// sealedOption is the cipher option with [LayerKey.Sealed]. Other tools ignore it, and keep
// it when they wrap the key for others.
const sealedOption = "pilot.sealed"

// PublicOptions returns the annotation that a layer's descriptor needs besides
// those of its recipients. It returns an error until the layer has been encrypted to
// EOF, since the annotation has the HMAC of the whole.
func (k *LayerKey) PublicOptions() (key, value string, err error) {
	if k.mac == nil {
		return "", "", errors.New("the layer has not been encrypted to its end")
	}
	b, err := json.Marshal(blockcipher.PublicLayerBlockCipherOptions{
		CipherType:    blockcipher.AES256CTR,
		Hmac:          k.mac,
		CipherOptions: map[string][]byte{},
	})
	if err != nil {
		return "", "", err
	}
	return annotationPubOpts, base64.StdEncoding.EncodeToString(b), nil
}

// newLayerKey joins the unwrapped private options with the value of the
// annotation that holds the public ones.
func newLayerKey(private []byte, public string) (*LayerKey, error) {
	if public == "" {
		return nil, fmt.Errorf("annotation %s is missing: the layer's cipher and HMAC are not known", annotationPubOpts)
	}
	b, err := base64.StdEncoding.DecodeString(public)
	if err != nil {
		return nil, fmt.Errorf("annotation %s: %w", annotationPubOpts, err)
	}
	var pub blockcipher.PublicLayerBlockCipherOptions
	if err := json.Unmarshal(b, &pub); err != nil {
		return nil, fmt.Errorf("annotation %s: %w", annotationPubOpts, err)
	}
	if pub.CipherType != blockcipher.AES256CTR {
		return nil, fmt.Errorf("annotation %s: cipher %.40q is not supported, only %s", annotationPubOpts, pub.CipherType, blockcipher.AES256CTR)
	}
	if len(pub.Hmac) != sha256.Size {
		return nil, fmt.Errorf("annotation %s: HMAC of %d bytes, not %d", annotationPubOpts, len(pub.Hmac), sha256.Size)
	}

	var priv blockcipher.PrivateLayerBlockCipherOptions
	if err := json.Unmarshal(private, &priv); err != nil {
		// The error of encoding/json may quote its input, which is secret.
		return nil, errors.New("the unwrapped layer key is not ocicrypt's JSON")
	}
	if len(priv.SymmetricKey) != KeySize {
		return nil, fmt.Errorf("the unwrapped layer key has %d bytes, not %d", len(priv.SymmetricKey), KeySize)
	}
	// The HMAC does not cover the nonce, so it has to come from the wrapped
	// part, where it can't be changed. Every known tool puts it there.
	nonce := priv.CipherOptions["nonce"]
	if len(nonce) != aes.BlockSize {
		return nil, fmt.Errorf("the unwrapped layer key has a nonce of %d bytes, not %d", len(nonce), aes.BlockSize)
	}
	if _, ok := pub.CipherOptions["nonce"]; ok {
		return nil, fmt.Errorf("annotation %s holds a nonce, which belongs in the wrapped part: it was tampered with", annotationPubOpts)
	}
	if priv.Digest != "" && priv.Digest.Validate() != nil {
		return nil, errors.New("the unwrapped layer key names an invalid digest")
	}
	sealed, ok := priv.CipherOptions[sealedOption]
	if ok && len(sealed) != sha256.Size {
		return nil, fmt.Errorf("the unwrapped layer key has a seal of %d bytes, not %d", len(sealed), sha256.Size)
	}
	return &LayerKey{Digest: priv.Digest, Sealed: sealed, key: priv.SymmetricKey, nonce: nonce, mac: pub.Hmac}, nil
}

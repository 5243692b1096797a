package processor

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/containers/ocicrypt"
	"github.com/containers/ocicrypt/config"
	"github.com/containers/ocicrypt/keywrap/jwe"
	"github.com/go-jose/go-jose/v4"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// newECPairs returns key pairs that are made faster than RSA's.
func newECPairs(t *testing.T, n int) []pair {
	t.Helper()
	fipstest.Refused(t, fipstest.JWE)
	pairs := make([]pair, n)
	for i := range pairs {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		private, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		pairs[i] = pair{
			pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}),
			pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}),
		}
	}
	return pairs
}

func forAll(pairs []pair) Recipients {
	var keys [][]byte
	for _, p := range pairs {
		keys = append(keys, p.public)
	}
	return Recipients{Parameters: map[string][][]byte{"pubkeys": keys}}
}

// encryptedKey returns a layer key that has encrypted a layer, and the layer.
func encryptedKey(t *testing.T) (*LayerKey, []byte) {
	t.Helper()
	fipstest.Refused(t, fipstest.JWE)
	key := NewLayerKey("")
	encrypter, err := NewEncrypter(strings.NewReader("layer"), key)
	if err != nil {
		t.Fatal(err)
	}
	defer encrypter.Close()
	b, err := io.ReadAll(encrypter)
	if err != nil {
		t.Fatal(err)
	}
	return key, b
}

// TestJWERecipients wraps for more recipients than go-jose parses in one JWE by
// default. Each of them unwraps, with ours and with ocicrypt under that default.
func TestJWERecipients(t *testing.T) {
	key, layer := encryptedKey(t)
	for _, n := range []int{32, 33, 65, 150} {
		pairs := newECPairs(t, n)
		annotations := wrapped(t, key, forAll(pairs), nil)
		desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer + "+encrypted", Annotations: annotations}
		for _, i := range []int{0, 31, n / 2, n - 1} {
			got, err := Unwrap(t.Context(), pairs[i].decrypt(), desc)
			if err != nil || !got.Equal(key) {
				t.Errorf("recipient %d of %d: %v", i, n, err)
			}
			jose.MaxRecipients = 32
			_, _, err = ocicrypt.DecryptLayer(pairs[i].decrypt().Private, bytes.NewReader(layer), desc, false)
			jose.MaxRecipients = maxJWERecipients
			if err != nil {
				t.Errorf("ocicrypt, recipient %d of %d: %v", i, n, err)
			}
		}
		if _, err := Unwrap(t.Context(), newPair(t).decrypt(), desc); !errors.Is(err, ErrNoKey) {
			t.Errorf("%d recipients, a stranger: %v", n, err)
		}
	}
}

func TestRecipientNamedTwiceIsWrappedForOnce(t *testing.T) {
	key, _ := encryptedKey(t)
	pairs := newECPairs(t, 2)
	count := func(to Recipients) int {
		text, err := base64.StdEncoding.DecodeString(wrapped(t, key, to, nil)[annotationKeysPrefix+"jwe"])
		if err != nil {
			t.Fatal(err)
		}
		var one struct{ Recipients []any } // none of them stands for a single one
		if err := json.Unmarshal(text, &one); err != nil {
			t.Fatal(err)
		}
		return max(1, len(one.Recipients))
	}
	if n := count(forAll([]pair{pairs[0], pairs[1], pairs[0]})); n != 2 {
		t.Errorf("wrapped for %d recipients, not 2", n)
	}
	named := forAll([]pair{pairs[0], pairs[0]})
	if n := count(named); n != 1 {
		t.Errorf("wrapped for %d recipients, not 1", n)
	}
	if n := len(named.Parameters["pubkeys"]); n != 2 {
		t.Errorf("the caller's parameters have %d keys now", n)
	}
}

// TestOneJWE unwraps what ocicrypt wrote, which has all recipients in one JWE.
func TestOneJWE(t *testing.T) {
	key, _ := encryptedKey(t)
	pairs := newECPairs(t, 200)
	private, err := key.private()
	if err != nil {
		t.Fatal(err)
	}
	one, err := jwe.NewKeyWrapper().WrapKeys(&config.EncryptConfig{Parameters: forAll(pairs).Parameters}, private)
	if err != nil {
		t.Fatal(err)
	}
	annotations := wrapped(t, key, forAll(pairs[:1]), nil)
	annotations[annotationKeysPrefix+"jwe"] = base64.StdEncoding.EncodeToString(one)
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer + "+encrypted", Annotations: annotations}
	if got, err := Unwrap(t.Context(), pairs[199].decrypt(), desc); err != nil || !got.Equal(key) {
		t.Errorf("unwrap: %v", err)
	}
}

// TestTooManyWrappedKeys wraps until no more are tried. All that were written unwrap.
func TestTooManyWrappedKeys(t *testing.T) {
	key, _ := encryptedKey(t)
	pairs := newECPairs(t, MaxWrappedKeys+1)
	var annotations map[string]string
	for i, p := range pairs {
		got, err := key.Wrap(t.Context(), p.encrypt(), annotations)
		if i == MaxWrappedKeys {
			if !errors.Is(err, ErrTooManyRecipients) {
				t.Errorf("one too many: %v", err)
			}
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		annotations = got
	}
	name, value, err := key.PublicOptions()
	if err != nil {
		t.Fatal(err)
	}
	annotations[name] = value
	if got, err := Unwrap(t.Context(), pairs[MaxWrappedKeys-1].decrypt(), ocispec.Descriptor{Annotations: annotations}); err != nil || !got.Equal(key) {
		t.Errorf("the last: %v", err)
	}
}

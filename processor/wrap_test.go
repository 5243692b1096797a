package processor

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/containers/ocicrypt/blockcipher"
	"github.com/containers/ocicrypt/config"
	"github.com/containers/ocicrypt/utils"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// pair is a key pair in PEM.
type pair struct{ public, private []byte }

func newPair(t testing.TB) pair {
	t.Helper()
	fipstest.Refused(t, fipstest.JWE)
	public, private, err := utils.CreateRSATestKey(2048, nil, true)
	if err != nil {
		t.Fatal(err)
	}
	return pair{public, private}
}

func (p pair) encrypt() Recipients {
	return Recipients{Parameters: map[string][][]byte{"pubkeys": {p.public}}}
}

func (p pair) decrypt() Keys {
	return Keys{Private: &config.DecryptConfig{Parameters: map[string][][]byte{
		"privkeys": {p.private}, "privkeys-passwords": {nil},
	}}}
}

// wrapped returns all the annotations of a layer that is wrapped for to, those
// that it had among them.
func wrapped(t *testing.T, k *LayerKey, to Recipients, had map[string]string) map[string]string {
	t.Helper()
	annotations, err := k.Wrap(t.Context(), to, had)
	if err != nil {
		t.Fatal(err)
	}
	key, value, err := k.PublicOptions()
	if err != nil {
		t.Fatal(err)
	}
	annotations[key] = value
	return annotations
}

func TestWrapForSeveral(t *testing.T) {
	ctx := t.Context()
	alice, bob, mallory := newPair(t), newPair(t), newPair(t)
	plain := randomBytes(1000)
	ciphertext, k := encrypt(t, plain)

	first := wrapped(t, k, alice.encrypt(), map[string]string{"unrelated": "kept by the caller"})
	if _, ok := first["unrelated"]; ok {
		t.Error("an annotation that is not ours came back")
	}
	// Bob is added later, by somebody who can unwrap.
	k, err := Unwrap(ctx, alice.decrypt(), ocispec.Descriptor{Annotations: first})
	if err != nil {
		t.Fatal(err)
	}
	both := wrapped(t, k, bob.encrypt(), first)
	if had, has := first["org.opencontainers.image.enc.keys.jwe"], both["org.opencontainers.image.enc.keys.jwe"]; !strings.HasPrefix(has, had+",") {
		t.Error("the first recipient was not kept in front")
	}

	for name, who := range map[string]pair{"alice": alice, "bob": bob} {
		k, err := Unwrap(ctx, who.decrypt(), ocispec.Descriptor{Annotations: both})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		d, err := NewDecrypter(bytes.NewReader(ciphertext), k)
		if err != nil {
			t.Fatal(err)
		}
		if out, err := io.ReadAll(d); err != nil || !bytes.Equal(out, plain) {
			t.Errorf("%s reads %d bytes, %v", name, len(out), err)
		}
	}
	if _, err := Unwrap(ctx, mallory.decrypt(), ocispec.Descriptor{Annotations: both}); !errors.Is(err, ErrNoKey) {
		t.Errorf("mallory: %v", err)
	}
	if _, err := Unwrap(ctx, Keys{}, ocispec.Descriptor{Annotations: both}); !errors.Is(err, ErrNoKey) || !strings.Contains(err.Error(), "jwe: no private key was given") {
		t.Errorf("nobody: %v", err)
	}
}

func TestWrapErrors(t *testing.T) {
	fipstest.Refused(t, fipstest.JWE)
	_, k := encrypt(t, []byte("layer"))
	k.mac = make([]byte, 32)
	for _, test := range []struct {
		params map[string][][]byte
		want   string
	}{
		{nil, "no recipient"},
		{map[string][][]byte{"nobody": {[]byte("team-a")}}, `key provider "nobody" is not configured: name it in the file that $OCICRYPT_KEYPROVIDER_CONFIG points to`},
		{map[string][][]byte{"pubkeys": {[]byte("not a key")}}, "wrap the layer key with jwe"},
	} {
		_, err := k.Wrap(t.Context(), Recipients{Parameters: test.params}, nil)
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%v: %v, want %q", test.params, err, test.want)
		}
	}
}

// testProvider is a key provider that notes what it was passed.
type testProvider struct {
	params            [][]byte
	layerKey, wrapped []byte
	err               error
}

func (p *testProvider) WrapKey(_ context.Context, params [][]byte, layerKey []byte) ([]byte, error) {
	p.params = params
	return p.wrapped, p.err
}

func (p *testProvider) UnwrapKey(_ context.Context, params [][]byte, annotation []byte) ([]byte, error) {
	p.params, p.wrapped = params, annotation
	return bytes.Clone(p.layerKey), p.err
}

// hangingProvider never answers.
type hangingProvider struct{}

func (hangingProvider) WrapKey(ctx context.Context, _ [][]byte, _ []byte) ([]byte, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func (hangingProvider) UnwrapKey(ctx context.Context, _ [][]byte, _ []byte) ([]byte, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// withProvider returns keys with one key provider.
func withProvider(name string, p KeyProvider) Keys {
	return Keys{Providers: map[string]KeyProvider{name: p}}
}

// TestProviderIsAskedAfterManyOthers unwraps with a key provider for a layer that
// somebody has given very many recipients for whom there is no key.
func TestProviderIsAskedAfterManyOthers(t *testing.T) {
	_, err := Unwrap(t.Context(), withProvider("late", &testProvider{layerKey: []byte("{}")}), ocispec.Descriptor{Annotations: map[string]string{
		"org.opencontainers.image.enc.keys.jwe":           strings.Repeat("!,", 100),
		"org.opencontainers.image.enc.keys.provider.late": "e30=",
	}})
	if err == nil || !strings.Contains(err.Error(), "provider.late: annotation org.opencontainers.image.enc.pubopts is missing") {
		t.Errorf("the key provider was not asked: %v", err)
	}
}

// TestProviderGetsItsOwnParametersOnly checks that a key provider gets its own parameters
// and not the private keys for another recipient.
func TestProviderGetsItsOwnParametersOnly(t *testing.T) {
	p := &testProvider{wrapped: []byte("wrapped")}
	alice := newPair(t)
	_, k := encrypt(t, []byte("layer"))
	to := alice.encrypt()
	to.Parameters["spy"] = [][]byte{[]byte("team-a")}
	to.Keys = alice.decrypt()
	to.Providers = map[string]KeyProvider{"spy": p}
	annotations, err := k.Wrap(t.Context(), to, nil)
	if err != nil {
		t.Fatal(err)
	}
	if annotations["org.opencontainers.image.enc.keys.provider.spy"] != base64.StdEncoding.EncodeToString([]byte("wrapped")) {
		t.Errorf("annotations: %v", annotations)
	}
	if len(p.params) != 1 || string(p.params[0]) != "team-a" {
		t.Errorf("WrapKey got %q", p.params)
	}

	keys := newPair(t).decrypt()
	keys.Providers = to.Providers
	keys.Private.Parameters["spy"] = [][]byte{[]byte("team-b")}
	if _, err := Unwrap(t.Context(), keys, ocispec.Descriptor{Annotations: annotations}); !errors.Is(err, ErrNoKey) || !strings.Contains(err.Error(), "provider.spy: it returned no layer key") {
		t.Errorf("a provider that returns nothing: %v", err)
	}
	if len(p.params) != 1 || string(p.params[0]) != "team-b" || string(p.wrapped) != "wrapped" {
		t.Errorf("UnwrapKey got %q and %q", p.params, p.wrapped)
	}
}

func TestUnwrapGivesUp(t *testing.T) {
	desc := ocispec.Descriptor{Annotations: map[string]string{"org.opencontainers.image.enc.keys.provider.silent": "e30="}}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := Unwrap(ctx, withProvider("silent", hangingProvider{}), desc)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "provider.silent: the key provider did not answer in time") {
		t.Errorf("error: %v", err)
	}
}

// TestDeniedOnlyIfAllDenied has several recipients, some of which a key provider refuses.
func TestDeniedOnlyIfAllDenied(t *testing.T) {
	refuses := fmt.Errorf("%w: not you", ErrDenied)
	desc := ocispec.Descriptor{Annotations: map[string]string{
		"org.opencontainers.image.enc.keys.provider.a": "e30=", "org.opencontainers.image.enc.keys.provider.b": "e30=",
	}}
	for _, test := range []struct {
		a, b   error
		denied bool
	}{{refuses, refuses, true}, {refuses, errors.New("away"), false}, {errors.New("away"), refuses, false}} {
		_, err := Unwrap(t.Context(), Keys{Providers: map[string]KeyProvider{"a": &testProvider{err: test.a}, "b": &testProvider{err: test.b}}}, desc)
		if !errors.Is(err, ErrNoKey) || errors.Is(err, ErrDenied) != test.denied {
			t.Errorf("%v and %v: %v", test.a, test.b, err)
		}
	}
}

// TestNoKeys uses keys and recipients that are empty, or have nil key providers.
func TestNoKeys(t *testing.T) {
	_, k := encrypt(t, []byte("layer"))
	desc := ocispec.Descriptor{Annotations: wrapped(t, k, Recipients{
		Keys: withProvider("p", &testProvider{wrapped: []byte("wrapped")}), Parameters: map[string][][]byte{"p": {[]byte("a")}, "pubkeys": {newPair(t).public}},
	}, nil)}
	for name, keys := range map[string]Keys{
		"zero": {}, "nil provider": withProvider("p", nil), "unread": {ProvidersErr: errors.New("the file is on fire")}, "with nothing": Keys{}.With(nil),
	} {
		_, err := Unwrap(t.Context(), keys, desc)
		if !errors.Is(err, ErrNoKey) || !strings.Contains(err.Error(), `jwe: no private key was given; key provider "p" is not configured`) {
			t.Errorf("%s: %v", name, err)
		}
		if keys.ProvidersErr != nil && !strings.Contains(err.Error(), "the file is on fire") {
			t.Errorf("%s: the reason is missing: %v", name, err)
		}
		if _, err := k.Wrap(t.Context(), Recipients{Keys: keys, Parameters: map[string][][]byte{"p": nil}}, nil); err == nil || !strings.Contains(err.Error(), `key provider "p" is not configured`) {
			t.Errorf("%s: wrap: %v", name, err)
		}
		if _, err := k.Wrap(t.Context(), Recipients{Keys: keys}, nil); err == nil || !strings.Contains(err.Error(), "no recipient") {
			t.Errorf("%s: wrap for nobody: %v", name, err)
		}
	}
}

// TestManyRecipients unwraps for a layer that somebody has given very many
// recipients. The error names each reason once.
func TestManyRecipients(t *testing.T) {
	alice := newPair(t)
	var damaged []string
	for i := range MaxWrappedKeys + 1 {
		damaged = append(damaged, strings.Repeat("A", i)+"!")
	}
	for name, c := range map[string]struct{ annotation, want string }{
		"empty":           {strings.Repeat("AA==,", 100000), "jwe: jose.ParseEncrypted failed; the layer has more than 64 wrapped keys"},
		"no base64":       {strings.Repeat("!,", 100000), "jwe: annotation is not base64: illegal base64 data at input byte 0; the layer has more than 64 wrapped keys"},
		"damaged in many": {strings.Join(damaged, ","), "and 61 more"},
	} {
		_, err := Unwrap(t.Context(), alice.decrypt(), ocispec.Descriptor{Annotations: map[string]string{"org.opencontainers.image.enc.keys.jwe": c.annotation}})
		if !errors.Is(err, ErrNoKey) || len(err.Error()) > 4000 || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: an error of %d bytes: %.400s", name, len(err.Error()), err)
		}
	}
}

func TestNewLayerKeyErrors(t *testing.T) {
	good := func() (blockcipher.PrivateLayerBlockCipherOptions, blockcipher.PublicLayerBlockCipherOptions) {
		return blockcipher.PrivateLayerBlockCipherOptions{
				SymmetricKey:  make([]byte, 32),
				CipherOptions: map[string][]byte{"nonce": make([]byte, 16)},
			}, blockcipher.PublicLayerBlockCipherOptions{
				CipherType: blockcipher.AES256CTR,
				Hmac:       make([]byte, 32),
			}
	}
	for _, test := range []struct {
		name   string
		change func(*blockcipher.PrivateLayerBlockCipherOptions, *blockcipher.PublicLayerBlockCipherOptions)
		want   string
	}{
		{"good", func(*blockcipher.PrivateLayerBlockCipherOptions, *blockcipher.PublicLayerBlockCipherOptions) {}, ""},
		{"cipher", func(_ *blockcipher.PrivateLayerBlockCipherOptions, pub *blockcipher.PublicLayerBlockCipherOptions) {
			pub.CipherType = "ROT13"
		}, `cipher "ROT13" is not supported`},
		{"no HMAC", func(_ *blockcipher.PrivateLayerBlockCipherOptions, pub *blockcipher.PublicLayerBlockCipherOptions) {
			pub.Hmac = nil
		}, "HMAC of 0 bytes"},
		{"short HMAC", func(_ *blockcipher.PrivateLayerBlockCipherOptions, pub *blockcipher.PublicLayerBlockCipherOptions) {
			pub.Hmac = pub.Hmac[:1]
		}, "HMAC of 1 bytes"},
		{"short key", func(priv *blockcipher.PrivateLayerBlockCipherOptions, _ *blockcipher.PublicLayerBlockCipherOptions) {
			priv.SymmetricKey = priv.SymmetricKey[:16]
		}, "has 16 bytes"},
		{"no nonce", func(priv *blockcipher.PrivateLayerBlockCipherOptions, _ *blockcipher.PublicLayerBlockCipherOptions) {
			priv.CipherOptions = nil
		}, "nonce of 0 bytes"},
		{"public nonce", func(_ *blockcipher.PrivateLayerBlockCipherOptions, pub *blockcipher.PublicLayerBlockCipherOptions) {
			pub.CipherOptions = map[string][]byte{"nonce": make([]byte, 16)}
		}, "tampered"},
		{"digest", func(priv *blockcipher.PrivateLayerBlockCipherOptions, _ *blockcipher.PublicLayerBlockCipherOptions) {
			priv.Digest = "sha256:../../etc"
		}, "invalid digest"},
	} {
		priv, pub := good()
		test.change(&priv, &pub)
		private, _ := json.Marshal(priv)
		public, _ := json.Marshal(pub)
		_, err := newLayerKey(private, base64.StdEncoding.EncodeToString(public))
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s: %v, want %q", test.name, err, test.want)
		}
	}
	if _, err := newLayerKey([]byte("{}"), ""); err == nil {
		t.Error("no pubopts at all: no error")
	}
}

func FuzzNewLayerKey(f *testing.F) {
	f.Add([]byte(`{"symkey":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","digest":"","cipheroptions":{"nonce":"AAAAAAAAAAAAAAAAAAAAAA=="}}`),
		base64.StdEncoding.EncodeToString([]byte(`{"cipher":"AES_256_CTR_HMAC_SHA256","hmac":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","cipheroptions":{}}`)))
	f.Fuzz(func(t *testing.T, private []byte, public string) {
		k, err := newLayerKey(private, public)
		if err != nil {
			return
		}
		d, err := NewDecrypter(bytes.NewReader([]byte("ciphertext")), k)
		if err != nil {
			t.Fatalf("an accepted key is refused: %v", err)
		}
		if _, err := io.Copy(io.Discard, d); !errors.Is(err, ErrTampered) {
			t.Fatalf("a made-up HMAC matches: %v", err)
		}
	})
}

package processor

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containers/ocicrypt/blockcipher"
	"github.com/containers/ocicrypt/config"
	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"
	protocol "github.com/containers/ocicrypt/keywrap/keyprovider"
	"github.com/containers/ocicrypt/utils"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/ocicryptclient"
)

// pair is a key pair in PEM.
type pair struct{ public, private []byte }

func newPair(t testing.TB) pair {
	t.Helper()
	public, private, err := utils.CreateRSATestKey(2048, nil, true)
	if err != nil {
		t.Fatal(err)
	}
	return pair{public, private}
}

func (p pair) encrypt() *config.EncryptConfig {
	return &config.EncryptConfig{Parameters: map[string][][]byte{"pubkeys": {p.public}}}
}

func (p pair) decrypt() *config.DecryptConfig {
	return &config.DecryptConfig{Parameters: map[string][][]byte{
		"privkeys": {p.private}, "privkeys-passwords": {nil},
	}}
}

// wrapped returns all the annotations of a layer that is wrapped for ec, those
// that it had among them.
func wrapped(t *testing.T, k *LayerKey, ec *config.EncryptConfig, had map[string]string) map[string]string {
	t.Helper()
	annotations, err := k.Wrap(t.Context(), ec, had)
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
	if _, err := Unwrap(ctx, &config.DecryptConfig{}, ocispec.Descriptor{Annotations: both}); !errors.Is(err, ErrNoKey) || !strings.Contains(err.Error(), "jwe: no private key was given") {
		t.Errorf("nobody: %v", err)
	}
}

func TestWrapErrors(t *testing.T) {
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
		_, err := k.Wrap(t.Context(), &config.EncryptConfig{Parameters: test.params}, nil)
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%v: %v, want %q", test.params, err, test.want)
		}
	}
}

// register registers the key providers of an ocicrypt.conf.
func register(t *testing.T, conf string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "ocicrypt.conf")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := RegisterKeyProviders(file); err != nil {
		t.Fatal(err)
	}
}

// TestRequests compares what a key provider is sent with what ocicrypt sends.
func TestRequests(t *testing.T) {
	for _, r := range []struct {
		ours   []byte
		theirs protocol.KeyProviderKeyWrapProtocolInput
	}{
		{sent(t, func(w providerWrapper) {
			w.wrap(t.Context(), &config.EncryptConfig{Parameters: map[string][][]byte{"p": {[]byte("team-a")}, "other": {[]byte("x")}}}, []byte("key"))
		}), protocol.KeyProviderKeyWrapProtocolInput{
			Operation: protocol.OpKeyWrap, KeyWrapParams: protocol.KeyWrapParams{Ec: &config.EncryptConfig{Parameters: map[string][][]byte{"p": {[]byte("team-a")}}}, OptsData: []byte("key")}}},
		{sent(t, func(w providerWrapper) { w.unwrap(t.Context(), &config.DecryptConfig{}, []byte("{}")) }), protocol.KeyProviderKeyWrapProtocolInput{
			Operation: protocol.OpKeyUnwrap, KeyUnwrapParams: protocol.KeyUnwrapParams{Dc: &config.DecryptConfig{}, Annotation: []byte("{}")}}},
	} {
		theirs, err := json.Marshal(r.theirs)
		if err != nil || string(r.ours) != string(theirs) {
			t.Errorf("%s\nwant %s, %v", r.ours, theirs, err)
		}
	}
}

// sent returns what do has the key provider p sent.
func sent(t *testing.T, do func(providerWrapper)) []byte {
	t.Helper()
	script := filepath.Join(t.TempDir(), "provider")
	writeScript(t, script, `cat >"$0.seen"; echo {}`)
	p, err := ocicryptclient.New(keyproviderconfig.KeyProviderAttrs{Command: &keyproviderconfig.Command{Path: script}})
	if err != nil {
		t.Fatal(err)
	}
	do(providerWrapper{"p", p})
	b, err := os.ReadFile(script + ".seen")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestOtherRecipients unwraps with a key provider for a layer that somebody has
// given very many recipients for whom there is no key.
func TestOtherRecipients(t *testing.T) {
	script := filepath.Join(t.TempDir(), "provider")
	writeScript(t, script, `echo '{"keyunwrapresults": {"optsdata": "e30="}}'`)
	register(t, `{"key-providers": {"late": {"cmd": {"path": "`+script+`"}}}}`)
	_, err := Unwrap(t.Context(), &config.DecryptConfig{}, ocispec.Descriptor{Annotations: map[string]string{
		"org.opencontainers.image.enc.keys.jwe":           strings.Repeat("!,", 100),
		"org.opencontainers.image.enc.keys.provider.late": "e30=",
	}})
	if err == nil || !strings.Contains(err.Error(), "provider.late: annotation org.opencontainers.image.enc.pubopts is missing") {
		t.Errorf("the key provider was not asked: %v", err)
	}
}

// TestProviderErrors uses key providers whose configuration or answers make no
// sense.
func TestProviderErrors(t *testing.T) {
	script := filepath.Join(t.TempDir(), "provider")
	writeScript(t, script, `echo '{"keyunwrapresults": "a secret"}'`)
	register(t, `{"key-providers": {"garbled": {"cmd": {"path": "`+script+`"}}, "empty": {}, "nowhere": {"grpc": "nowhere"}}}`)
	for name, want := range map[string]string{
		"garbled": "provider.garbled: its answer is not the JSON of ocicrypt's key provider protocol",
		"empty":   "ocicrypt.conf: it has neither cmd nor grpc",
		"nowhere": `ocicrypt.conf: grpc "nowhere" is not unix:///PATH or HOST:PORT`,
	} {
		desc := ocispec.Descriptor{Annotations: map[string]string{"org.opencontainers.image.enc.keys.provider." + name: "e30="}}
		_, err := Unwrap(t.Context(), &config.DecryptConfig{}, desc)
		if !errors.Is(err, ErrNoKey) || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	for _, file := range []string{script, filepath.Join(t.TempDir(), "nowhere")} {
		if err := RegisterKeyProviders(file); err == nil || !strings.Contains(err.Error(), file) {
			t.Errorf("%s: %v", file, err)
		}
	}
}

// TestProviderIsTold checks that a key provider gets its own parameters and
// not the private keys meant for somebody else.
func TestProviderIsTold(t *testing.T) {
	script := filepath.Join(t.TempDir(), "provider")
	seen := script + ".seen"
	writeScript(t, script, `cat >`+seen+`; printf '{"keywrapresults":{"annotation":"d3JhcHBlZA=="},"keyunwrapresults":{}}'`)
	register(t, `{"key-providers": {"spy": {"cmd": {"path": "`+script+`"}}}}`)
	alice := newPair(t)
	_, k := encrypt(t, []byte("layer"))
	ec := alice.encrypt()
	ec.Parameters["spy"] = [][]byte{[]byte("team-a")}
	ec.DecryptConfig = *alice.decrypt()
	annotations, err := k.Wrap(t.Context(), ec, nil)
	if err != nil {
		t.Fatal(err)
	}
	if annotations["org.opencontainers.image.enc.keys.provider.spy"] != base64.StdEncoding.EncodeToString([]byte("wrapped")) {
		t.Errorf("annotations: %v", annotations)
	}
	told := readFile(t, seen)
	if !strings.Contains(told, base64.StdEncoding.EncodeToString([]byte("team-a"))) || strings.Contains(told, "privkeys") || strings.Contains(told, "pubkeys") {
		t.Errorf("on wrap the provider was told %s", told)
	}

	dc := alice.decrypt()
	dc.Parameters["privkeys"] = [][]byte{newPair(t).private}
	if _, err := Unwrap(t.Context(), dc, ocispec.Descriptor{Annotations: annotations}); !errors.Is(err, ErrNoKey) {
		t.Errorf("a provider that answers nothing: %v", err)
	}
	if told := readFile(t, seen); strings.Contains(told, "privkeys") {
		t.Errorf("on unwrap the provider was told %s", told)
	}
}

func TestUnwrapGivesUp(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // it accepts and never says a word
	register(t, `{"key-providers": {"silent": {"grpc": "unix://`+socket+`"}}}`)
	desc := ocispec.Descriptor{Annotations: map[string]string{"org.opencontainers.image.enc.keys.provider.silent": "e30="}}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err = Unwrap(ctx, &config.DecryptConfig{}, desc)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "provider.silent: the key provider did not answer in time") {
		t.Errorf("error: %v", err)
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

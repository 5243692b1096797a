package image

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"math/big"
	mathrand "math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"github.com/containers/ocicrypt/config"
	"github.com/go-jose/go-jose/v4"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/ctrlplane/pilot/processor"
)

// recipient is whom images are encrypted for in TestProperty, and the key that
// alone opens what is encrypted for it.
type recipient struct {
	scheme string
	kek    string
	ec     map[string][][]byte
	dc     map[string][][]byte
}

func (r recipient) String() string { return strings.TrimSuffix(r.scheme+":"+r.kek, ":") }

// recipients are all that images are encrypted for, and a stranger's key.
type recipients struct {
	all      []recipient
	crowd    []recipient // of JWE, more than a layer can have
	stranger processor.Keys
}

// newRecipients makes keys of each kind, and KEKs of a broker.
func newRecipients(t testing.TB) *recipients {
	t.Helper()
	fipstest.Refused(t, fipstest.JWE)
	newKEKs(t, "a", "b", "c")
	r := &recipients{}
	for i := range 2 {
		key, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			t.Fatal(err)
		}
		r.all = append(r.all, jwe(t, key, i == 1), pkcs7(t, key, fmt.Sprintf("recipient %d", i)))
	}
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()} {
		r.all = append(r.all, jwe(t, newEC(t, curve), false), jwe(t, newEC(t, curve), true))
	}
	for range 70 {
		r.crowd = append(r.crowd, jwe(t, newEC(t, elliptic.P256()), false))
	}
	r.all = append(r.all, pgpRecipient(t, "one@example.com"), pgpRecipient(t, "two@example.com"))
	for _, kek := range []recipient{
		{scheme: "provider.pilot", kek: "a"}, {scheme: "provider.pilot", kek: "b"}, {scheme: "provider.second", kek: "c"},
		{scheme: "provider.original", kek: "a"}, {scheme: "provider.remote", kek: "b"},
	} {
		name := strings.TrimPrefix(kek.scheme, providerScheme)
		kek.ec = map[string][][]byte{name: {[]byte(kek.kek)}}
		if name == "original" {
			kek.dc = kek.ec
		}
		r.all = append(r.all, kek)
	}
	r.stranger = processor.Keys{Private: &config.DecryptConfig{Parameters: jwe(t, newEC(t, elliptic.P256()), false).dc}}
	return r
}

// choose returns some of them, now and then a crowd.
func (r *recipients) choose(rng *mathrand.Rand) []recipient {
	if rng.IntN(60) == 0 {
		return r.crowd[:20+rng.IntN(50)]
	}
	var list []recipient
	for _, i := range rng.Perm(len(r.all))[:1+min(rng.IntN(4), rng.IntN(5))] {
		list = append(list, r.all[i])
	}
	return list
}

// encryptConfig is what encrypts for all of a list.
func encryptConfig(list []recipient) processor.Recipients {
	return processor.Recipients{Keys: kekOnly, Parameters: merged(list, func(r recipient) map[string][][]byte { return r.ec })}
}

// decryptConfig has the keys of all of a list.
func decryptConfig(list []recipient) processor.Keys {
	return kekOnly.With(&config.DecryptConfig{Parameters: merged(list, func(r recipient) map[string][][]byte { return r.dc })})
}

func merged(list []recipient, of func(recipient) map[string][][]byte) map[string][][]byte {
	all := make(map[string][][]byte)
	for _, r := range list {
		for name, values := range of(r) {
			if name == "gpg-pubkeyringfile" && all[name] != nil {
				values = [][]byte{append(bytes.Clone(all[name][0]), values[0]...)}
				all[name] = nil
			}
			all[name] = append(all[name], values...)
		}
	}
	return all
}

// opens returns the layer key that the recipient unwraps of an encrypted layer from
// what is wrapped for it, and from nothing else.
func (r recipient) opens(ctx context.Context, desc ocispec.Descriptor) (*processor.LayerKey, error) {
	alone := desc
	alone.Annotations = maps.Clone(desc.Annotations)
	maps.DeleteFunc(alone.Annotations, func(key, _ string) bool {
		return strings.HasPrefix(key, keysPrefix) && key != keysPrefix+r.scheme
	})
	dc := kekOnly.With(&config.DecryptConfig{Parameters: r.dc})
	if r.kek == "" {
		return processor.Unwrap(ctx, dc, alone)
	}
	var first error
	for _, v := range values(r.scheme, desc.Annotations[keysPrefix+r.scheme]) {
		for _, k := range v.keys {
			if k.KEK != r.kek && k.KEK != "" || k.json == nil {
				continue
			}
			alone.Annotations[keysPrefix+r.scheme] = base64.StdEncoding.EncodeToString(k.json)
			key, err := processor.Unwrap(ctx, dc, alone)
			if err == nil {
				return key, nil
			}
			first = errors.Join(first, err)
		}
	}
	return nil, errors.Join(first, fmt.Errorf("nothing is wrapped for %s", r))
}

func newEC(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// jwe makes a JWE recipient, with keys in PEM, or as JWK and DER.
func jwe(t testing.TB, key crypto.Signer, jwk bool) recipient {
	t.Helper()
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	if jwk {
		// ocicrypt takes a JWK without an algorithm for one of RSA.
		alg := string(jose.RSA_OAEP_256)
		if _, ok := key.(*ecdsa.PrivateKey); ok {
			alg = string(jose.ECDH_ES_A256KW)
		}
		if public, err = (jose.JSONWebKey{Key: key.Public(), Algorithm: alg}).MarshalJSON(); err != nil {
			t.Fatal(err)
		}
	} else {
		public = pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})
		private = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})
	}
	return recipient{scheme: "jwe", ec: map[string][][]byte{"pubkeys": {public}}, dc: map[string][][]byte{"privkeys": {private}, "privkeys-passwords": {nil}}}
}

func pkcs7(t testing.TB, key *rsa.PrivateKey, name string) recipient {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(int64(len(name)) + 1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})
	return recipient{scheme: "pkcs7", ec: map[string][][]byte{"x509s": {certificate}},
		dc: map[string][][]byte{"privkeys": {private}, "privkeys-passwords": {nil}, "x509s": {certificate}}}
}

func pgpRecipient(t testing.TB, mail string) recipient {
	t.Helper()
	entity, err := openpgp.NewEntity("recipient", "", mail, &packet.Config{Algorithm: packet.PubKeyAlgoEdDSA})
	if err != nil {
		t.Fatal(err)
	}
	var public, private bytes.Buffer
	if err := errors.Join(entity.SerializePrivate(&private, nil), entity.Serialize(&public)); err != nil {
		t.Fatal(err)
	}
	return recipient{scheme: "pgp", ec: map[string][][]byte{"gpg-recipients": {[]byte(mail)}, "gpg-pubkeyringfile": {public.Bytes()}},
		dc: map[string][][]byte{"gpg-privatekeys": {private.Bytes()}, "gpg-privatekeys-passwords": {nil}}}
}

package server_test

import (
	"crypto"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/copilot/server/caller"
	"github.com/ctrlplane/pilot/internal/certfile/certtest"
)

// TestForgedTokens shows tokens that are not signed, or not by the issuer's key.
func TestForgedTokens(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	ca := certtest.NewAuthority(t)
	issuer, foreign := newOIDCIssuer(t), newOIDCIssuer(t)
	issuerCA := writeFile(t, filepath.Join(dir, "issuer.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: issuer.Certificate().Raw})))
	address := serveTLS(t, dir, ca, server.Config{
		TLSClientCA: ca.File,
		Policy:      writeFile(t, filepath.Join(dir, "policy.toml"), tokenPolicy),
		Issuers:     map[string]caller.Issuer{"cluster": {URL: issuer.URL, Audience: "copilot", CA: issuerCA}},
	})
	const path = "/api/v2/keks/team-a/key?version=1"
	good := issuer.token(t, nil)
	owner := newRemote(t, address, ca, nil)
	owner.token = good
	owner.want(t, 200, "GET", path, "")

	parts := strings.Split(good, ".")
	signed := func(key any, alg jose.SignatureAlgorithm, header map[jose.HeaderKey]any) string {
		t.Helper()
		options := &jose.SignerOptions{ExtraHeaders: header}
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, options)
		if err != nil {
			t.Fatal(err)
		}
		payload, err := base64.RawURLEncoding.DecodeString(parts[1])
		if err != nil {
			t.Fatal(err)
		}
		var claims map[string]any
		if err := json.Unmarshal(payload, &claims); err != nil {
			t.Fatal(err)
		}
		token, err := jwt.Signed(signer).Claims(claims).Serialize()
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	public := issuer.key.Public()
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	jwk, err := json.Marshal(jose.JSONWebKey{Key: public, KeyID: issuer.keyID(), Algorithm: "ES256", Use: "sig"})
	if err != nil {
		t.Fatal(err)
	}
	kid := map[jose.HeaderKey]any{"kid": issuer.keyID()}
	header := func(text string) string { return base64.RawURLEncoding.EncodeToString([]byte(text)) }
	forged := map[string]string{
		"none":                header(`{"alg":"none"}`) + "." + parts[1] + ".",
		"None":                header(`{"alg":"None","kid":"`+issuer.keyID()+`"}`) + "." + parts[1] + ".",
		"none, signed":        header(`{"alg":"none"}`) + "." + parts[1] + "." + parts[2],
		"no alg":              header(`{"kid":"`+issuer.keyID()+`"}`) + "." + parts[1] + "." + parts[2],
		"two algs":            header(`{"alg":"ES256","alg":"none","kid":"`+issuer.keyID()+`"}`) + "." + parts[1] + ".",
		"HS256 of the PEM":    signed(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), jose.HS256, kid),
		"HS256 of the DER":    signed(der, jose.HS256, kid),
		"HS512 of the JWK":    signed(append(jwk, make([]byte, 64)...), jose.HS512, kid),
		"HS256 of a zero key": signed(make([]byte, 32), jose.HS256, kid),
		"the kid of another":  signed(foreign.key, jose.ES256, kid),
		"a foreign kid":       signed(foreign.key, jose.ES256, map[jose.HeaderKey]any{"kid": foreign.keyID()}),
		"no kid":              signed(foreign.key, jose.ES256, nil),
		"a path as kid":       signed(foreign.key, jose.ES256, map[jose.HeaderKey]any{"kid": "../../../../dev/null"}),
		"a URL as kid":        signed(foreign.key, jose.ES256, map[jose.HeaderKey]any{"kid": foreign.URL + "/keys"}),
		"keys elsewhere":      signed(foreign.key, jose.ES256, map[jose.HeaderKey]any{"kid": foreign.keyID(), "jku": foreign.URL + "/keys"}),
		"certificate along":   signed(foreign.key, jose.ES256, map[jose.HeaderKey]any{"kid": foreign.keyID(), "x5u": foreign.URL + "/cert"}),
		"key along":           signed(foreign.key, jose.ES256, map[jose.HeaderKey]any{"jwk": jose.JSONWebKey{Key: crypto.PublicKey(foreign.key.Public())}}),
		"a foreign issuer":    foreign.token(t, nil),
		"its issuer, with /":  issuer.token(t, func(c *jwt.Claims) { c.Issuer += "/" }),
		"its issuer, capital": issuer.token(t, func(c *jwt.Claims) { c.Issuer = strings.ToUpper(c.Issuer) }),
		"no issuer":           issuer.token(t, func(c *jwt.Claims) { c.Issuer = "" }),
		"a space after":       parts[0] + "." + parts[1] + "." + parts[2] + ".x",
	}
	for name, token := range forged {
		stranger := newRemote(t, address, ca, nil)
		stranger.token = token
		// Bad tokens of one address are limited after some.
		eventually(t, func() bool {
			status, answer := stranger.do(t, "GET", path, "")
			if status == 429 {
				time.Sleep(50 * time.Millisecond)
				return false
			}
			if status != 401 {
				t.Errorf("%s: %d %s", name, status, answer)
			}
			return true
		})
	}
	eventually(t, func() bool { status, _ := owner.do(t, "GET", path, ""); return status == 200 })
}

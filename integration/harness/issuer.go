package harness

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// Claims are those of a CI job's token.
type Claims map[string]any

// With returns claims with others besides or in their place. One that is nil is left out.
func (c Claims) With(others Claims) Claims {
	all := maps.Clone(c)
	maps.Copy(all, others)
	maps.DeleteFunc(all, func(_ string, v any) bool { return v == nil })
	return all
}

// Issuer is an OpenID Connect issuer that gives tokens to CI jobs, over TLS. It also
// answers as GitHub does at ACTIONS_ID_TOKEN_REQUEST_URL.
type Issuer struct {
	t       testing.TB
	server  *httptest.Server
	key     *rsa.PrivateKey
	cert    *x509.Certificate // of the key
	URL, CA string            // CA is the file of its certificate

	mu       sync.Mutex
	jobs     map[string]Claims // by the token that a job shows to get its own
	status   int               // with which it answers jobs, if it is not 0
	lifetime time.Duration
	fetched  int // by jobs
}

// StartIssuer starts an issuer.
func StartIssuer(t testing.TB) *Issuer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	i := &Issuer{t: t, key: key, cert: cert, jobs: map[string]Claims{}, lifetime: 5 * time.Minute}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, r *http.Request) {
		json.NewEncoder(w).Encode(map[string]any{"issuer": i.URL, "jwks_uri": i.URL + "/.well-known/jwks", "id_token_signing_alg_values_supported": []string{"RS256"}})
	})
	mux.HandleFunc("GET /.well-known/jwks", func(w http.ResponseWriter, r *http.Request) {
		json.NewEncoder(w).Encode(i.keys())
	})
	mux.HandleFunc("GET /job", i.answerJob)
	i.server = httptest.NewTLSServer(mux)
	t.Cleanup(i.server.Close)
	i.URL = i.server.URL
	i.CA = Write(t, TempDir(t)+"/issuer.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.server.Certificate().Raw})))
	return i
}

// Token returns a token with claims, which may have other times and another audience than
// what a token has by default.
func (i *Issuer) Token(audience string, claims Claims) string {
	i.t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: i.key, KeyID: "1"}}, nil)
	if err != nil {
		i.t.Fatal(err)
	}
	now := time.Now().Unix()
	all := Claims{"iss": i.URL, "aud": audience, "iat": now, "nbf": now, "exp": now + int64(i.lifetime/time.Second), "jti": NewSecret()}.With(claims)
	token, err := jwt.Signed(signer).Claims(map[string]any(all)).Serialize()
	if err != nil {
		i.t.Fatal(err)
	}
	return token
}

// Job returns the variables of a GitHub Actions job with claims, which has the permission
// to get tokens.
func (i *Issuer) Job(claims Claims) []string {
	bearer := NewSecret()
	i.mu.Lock()
	defer i.mu.Unlock()
	i.jobs[bearer] = claims
	return []string{
		"ACTIONS_ID_TOKEN_REQUEST_URL=" + i.URL + "/job?api-version=2.0",
		"ACTIONS_ID_TOKEN_REQUEST_TOKEN=" + bearer,
		"SSL_CERT_FILE=" + i.CA,
	}
}

// AnswerJobs has jobs that ask for a token answered with a status, or as usual if it is 0.
func (i *Issuer) AnswerJobs(status int) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.status = status
}

// Lifetime has tokens that are not valid for longer.
func (i *Issuer) Lifetime(d time.Duration) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.lifetime = d
}

// Fetched returns how many tokens jobs have got.
func (i *Issuer) Fetched() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.fetched
}

// answerJob answers as https://docs.github.com/en/actions/reference/security/oidc says.
func (i *Issuer) answerJob(w http.ResponseWriter, r *http.Request) {
	i.mu.Lock()
	defer i.mu.Unlock()
	scheme, bearer, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	claims, ok := i.jobs[bearer]
	switch {
	case i.status != 0:
		http.Error(w, http.StatusText(i.status), i.status)
	case !strings.EqualFold(scheme, "bearer") || !ok:
		http.Error(w, "bad credentials", http.StatusUnauthorized)
	case r.URL.Query().Get("api-version") != "2.0" || r.URL.Query().Get("audience") == "":
		http.Error(w, "bad request", http.StatusBadRequest)
	default:
		i.fetched++
		token := i.Token(r.URL.Query().Get("audience"), claims)
		fmt.Fprintf(w, `{"count":%d,"value":%q}`, len(token), token)
	}
}

// KeysFile writes the public keys of the issuer to a file, as a JSON Web Key Set.
func (i *Issuer) KeysFile() string {
	i.t.Helper()
	b, err := json.Marshal(i.keys())
	if err != nil {
		i.t.Fatal(err)
	}
	return Write(i.t, TempDir(i.t)+"/keys.json", string(b))
}

func (i *Issuer) keys() jose.JSONWebKeySet {
	// With a certificate, as Entra ID and Keycloak have it.
	return jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: i.key.Public(), KeyID: "1", Algorithm: "RS256", Use: "sig", Certificates: []*x509.Certificate{i.cert}}}}
}

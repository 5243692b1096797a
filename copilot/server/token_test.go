package server_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/ctrlplane/pilot/copilot/policy"
	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/copilot/server/caller"
	"github.com/ctrlplane/pilot/internal/certfile/certtest"
)

// oidcIssuer is an OpenID Connect issuer.
type oidcIssuer struct {
	*httptest.Server
	key    *ecdsa.PrivateKey
	down   bool
	bearer string // what it wants to be shown
}

func newOIDCIssuer(t *testing.T) *oidcIssuer {
	t.Helper()
	i := &oidcIssuer{}
	i.newKey(t)
	i.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if i.down || r.Header.Get("Authorization") != i.bearer {
			http.Error(w, "no", http.StatusForbidden)
			return
		}
		switch r.URL.Path {
		case "/.well-known/openid-configuration":
			json.NewEncoder(w).Encode(map[string]any{"issuer": i.URL, "jwks_uri": i.URL + "/keys", "id_token_signing_alg_values_supported": []string{"ES256"}})
		case "/keys":
			json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: i.key.Public(), KeyID: i.keyID(), Algorithm: "ES256", Use: "sig"}}})
		default:
			http.NotFound(w, r)
		}
	}))
	t.Cleanup(i.Close)
	return i
}

func (i *oidcIssuer) newKey(t *testing.T) {
	t.Helper()
	var err error
	if i.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
}

func (i *oidcIssuer) keyID() string { return fmt.Sprintf("%x", i.key.X.Bytes()[:8]) }

// token returns a token like those that Kubernetes before 1.30 projects into pods, with
// claims changed.
func (i *oidcIssuer) token(t *testing.T, change func(*jwt.Claims)) string {
	t.Helper()
	return i.nodeToken(t, "", change)
}

// nodeToken returns a token like those that Kubernetes 1.30 projects into a node's pods.
func (i *oidcIssuer) nodeToken(t *testing.T, node string, change func(*jwt.Claims)) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: i.key, KeyID: i.keyID()}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	claims := jwt.Claims{
		Issuer: i.URL, Subject: "system:serviceaccount:prod:puller", Audience: jwt.Audience{"copilot"},
		IssuedAt: jwt.NewNumericDate(now), NotBefore: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(now.Add(time.Hour)),
	}
	if change != nil {
		change(&claims)
	}
	bound := map[string]any{"namespace": "prod", "serviceaccount": map[string]string{"name": "puller", "uid": "1"}}
	if node != "" {
		bound["node"] = map[string]string{"name": node, "uid": "2"}
	}
	token, err := jwt.Signed(signer).Claims(claims).Claims(map[string]any{"kubernetes.io": bound}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func TestTokens(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	ca := certtest.NewAuthority(t)
	issuer, foreign := newOIDCIssuer(t), newOIDCIssuer(t)
	issuer.down = true
	issuer.bearer = "Bearer its own"
	issuerCA := writeFile(t, filepath.Join(dir, "issuer.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: issuer.Certificate().Raw})))
	tokenFile := writeFile(t, filepath.Join(dir, "token"), "its own\n")
	address := serveTLS(t, dir, ca, server.Config{
		TLSClientCA: ca.File,
		Policy:      writeFile(t, filepath.Join(dir, "policy.toml"), tokenPolicy),
		Issuers:     map[string]caller.Issuer{"cluster": {URL: issuer.URL, Audience: "copilot", CA: issuerCA, TokenFile: tokenFile}},
	})
	pod := newRemote(t, address, ca, nil)
	const path = "/api/v2/keks/team-a/key?version=1"
	if answer := pod.want(t, 401, "GET", path, ""); !strings.Contains(answer, "show a client certificate or a bearer token") {
		t.Error(answer)
	}
	pod.token = issuer.token(t, nil)
	for range 3 {
		if answer := pod.want(t, 503, "GET", path, ""); !strings.Contains(answer, "can't fetch the keys of the token's issuer") || strings.Contains(answer, issuer.URL) {
			t.Error(answer)
		}
	}
	issuer.down = false
	eventually(t, func() bool { status, _ := pod.do(t, "GET", path, ""); return status == 200 })
	if e := lastAudited(t, dir); e.Who != "cluster:system:serviceaccount:prod:puller" || e.Verdict != "allowed" {
		t.Errorf("audited %+v", e)
	}
	good := pod.token
	none := jwtNone(good)
	for name, test := range map[string]struct{ token, want string }{
		"expired":             {issuer.token(t, func(c *jwt.Claims) { c.Expiry = jwt.NewNumericDate(time.Now().Add(-time.Second)) }), "expired"},
		"from tomorrow":       {issuer.token(t, func(c *jwt.Claims) { c.NotBefore = jwt.NewNumericDate(time.Now().Add(24 * time.Hour)) }), "before the nbf"},
		"for another":         {issuer.token(t, func(c *jwt.Claims) { c.Audience = jwt.Audience{"vault"} }), "audience"},
		"of nobody":           {issuer.token(t, func(c *jwt.Claims) { c.Subject = "" }), "no subject"},
		"of a foreign issuer": {foreign.token(t, nil), "not configured in this broker"},
		"signed by another":   {foreign.token(t, func(c *jwt.Claims) { c.Issuer = issuer.URL }), "failed to verify"},
		"changed":             {good[:len(good)-6] + "AAAAAA", "failed to verify"},
		"unsigned":            {none, "token of issuer cluster"},
		"no token":            {"xyz", "not a JSON web token"}, // no hexadecimal digits, as a request's id has
		"three parts":         {"a.b.c", "not a JSON web token"},
		"10 KB":               {strings.Repeat("x", 17<<10), "larger than 16384 bytes"},
	} {
		pod.token = test.token
		answer := pod.want(t, 401, "GET", path, "")
		if !strings.Contains(answer, test.want) {
			t.Errorf("%s: %s", name, answer)
		}
		if strings.Contains(answer, test.token) {
			t.Errorf("%s: the token is in the answer", name)
		}
	}
	// Clocks may differ by some minutes.
	pod.token = issuer.token(t, func(c *jwt.Claims) { c.NotBefore = jwt.NewNumericDate(time.Now().Add(time.Minute)) })
	pod.want(t, 200, "GET", path, "")
	// A certificate does not make up for a bad token.
	files := ca.Issue(t, spiffe("/node/7"))
	both := newRemote(t, address, ca, &files)
	both.want(t, 200, "GET", path, "")
	both.token = none
	both.want(t, 401, "GET", path, "")
	// The issuer has new keys.
	issuer.newKey(t)
	pod.token = issuer.token(t, nil)
	eventually(t, func() bool { // its keys are not fetched again for some seconds
		status, _ := pod.do(t, "GET", path, "")
		return status == 200
	})
	pod.token = issuer.token(t, func(c *jwt.Claims) { c.Subject = "system:serviceaccount:prod:other" })
	pod.want(t, 403, "GET", path, "")
	log := read(t, filepath.Join(dir, "audit.log"))
	if strings.Contains(log, good[len(good)-20:]) {
		t.Error("a token is in the audit log")
	}
}

// TestHangingIssuerDelaysNoOtherCaller has many clients show tokens of an issuer that
// accepts connections and does not answer.
func TestHangingIssuerDelaysNoOtherCaller(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	ca := certtest.NewAuthority(t)
	issuer := newOIDCIssuer(t)
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	issuer.URL = "https://" + silent.Addr().String()
	address := serveTLS(t, dir, ca, server.Config{
		TLSClientCA: ca.File, Policy: writeFile(t, filepath.Join(dir, "policy.toml"), tokenPolicy),
		Issuers: map[string]caller.Issuer{"cluster": {URL: issuer.URL, Audience: "copilot"}},
	})
	begin := time.Now()
	var wg sync.WaitGroup
	var answered atomic.Int32
	for range 8 {
		pod := newRemote(t, address, ca, nil)
		pod.token = issuer.token(t, nil)
		wg.Go(func() {
			if status, answer := pod.do(t, "GET", "/api/v2/keks/team-a/key", ""); status != 503 || !strings.Contains(answer, "can't fetch the keys of the token's issuer") {
				t.Errorf("%d %s", status, answer)
			}
			answered.Add(1)
		})
	}
	// Other callers do not wait for it.
	files := ca.Issue(t, spiffe("/node/7"))
	newRemote(t, address, ca, &files).want(t, 200, "GET", "/api/v2/keks/team-a/key", "")
	if n := answered.Load(); n > 0 && time.Since(begin) < 5*time.Second { // after which they are
		t.Errorf("a certificate's holder is answered after %d of those who wait for the issuer", n)
	}
	wg.Wait()
	// One after the other they would take 8 times as long as one.
	if took := time.Since(begin); took > 25*time.Second {
		t.Errorf("they wait for one another: %s", took)
	}
}

// jwtNone returns a token with the algorithm none.
func jwtNone(token string) string {
	parts := strings.Split(token, ".")
	return "eyJhbGciOiJub25lIn0." + parts[1] + "."
}

// TestUnauthenticatedCallersDoNotFillTheAuditLog sends many requests without
// credentials.
func TestUnauthenticatedCallersDoNotFillTheAuditLog(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	ca := certtest.NewAuthority(t)
	issuer := newOIDCIssuer(t)
	address := serveTLS(t, dir, ca, server.Config{
		TLSClientCA: ca.File,
		Issuers:     map[string]caller.Issuer{"cluster": {URL: issuer.URL, Audience: "copilot"}},
	})
	files := ca.Issue(t, spiffe("/node/1"))
	node := newRemote(t, address, ca, &files)
	unknown := newRemote(t, address, ca, nil)
	unknown.token = "a.b.c"
	unknown.client.Transport.(*http.Transport).DisableKeepAlives = false
	begin, before := time.Now(), len(audited(t, dir))
	counts := make(map[int]int)
	for range 500 {
		status, _ := unknown.do(t, "GET", "/api/v2/keks/team-a/key", "")
		counts[status]++
	}
	took := time.Since(begin)
	node.want(t, 403, "GET", "/api/v2/keks/team-a/key", "") // from the same address
	most := 64 + int(took/time.Second)/5
	if lines := len(audited(t, dir)) - before; lines < 1 || lines > most || counts[401] == 0 || counts[401]+counts[429] != 500 {
		t.Errorf("%d lines, at most %d: %v", lines, most, counts)
	}
	// A slow machine sends fewer than are allowed.
	if perSecond, burst := new(policy.Policy).Limit("anonymous"); float64(burst)+took.Seconds()*perSecond < 500 && counts[429] == 0 {
		t.Errorf("500 requests in %s, and none was too many", took)
	}
}

// TestIssuerIsAskedAtItsOwnHostOnly has an issuer that refers to other hosts, and
// tokens that would make copilot fetch its keys for each request.
func TestIssuerIsAskedAtItsOwnHostOnly(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	ca := certtest.NewAuthority(t)
	var strangers, keys atomic.Int32
	stranger := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		strangers.Add(1)
		t.Errorf("%s was asked for %s, with %q", r.Host, r.URL, r.Header.Get("Authorization"))
	}))
	defer stranger.Close()
	issuer := newOIDCIssuer(t)
	issuer.bearer = "Bearer its own"
	var mu sync.Mutex
	keysAt, redirect := "", ""
	plain := issuer.Server.Config.Handler
	issuer.Server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		keysURL, to := keysAt, redirect
		mu.Unlock()
		switch {
		case r.URL.Path == "/keys" && to != "":
			http.Redirect(w, r, to, http.StatusFound)
			return
		case r.URL.Path == "/keys":
			keys.Add(1)
		case keysURL != "":
			json.NewEncoder(w).Encode(map[string]any{"issuer": issuer.URL, "jwks_uri": keysURL, "id_token_signing_alg_values_supported": []string{"ES256"}})
			return
		}
		plain.ServeHTTP(w, r)
	})
	serve := func() *remote {
		t.Helper()
		dir := t.TempDir()
		create(t, dir, map[string][]byte{"team-a": nil})
		address := serveTLS(t, dir, ca, server.Config{
			TLSClientCA: ca.File, Policy: writeFile(t, filepath.Join(dir, "policy.toml"), tokenPolicy),
			Issuers: map[string]caller.Issuer{"cluster": {URL: issuer.URL, Audience: "copilot",
				CA:        writeFile(t, filepath.Join(dir, "issuer.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: issuer.Certificate().Raw}))),
				TokenFile: writeFile(t, filepath.Join(dir, "token"), "its own")}},
		})
		return newRemote(t, address, ca, nil)
	}
	const path = "/api/v2/keks/team-a/key?version=1"
	for name, elsewhere := range map[string][2]string{
		"keys elsewhere":     {stranger.URL + "/keys", ""},
		"keys over HTTP":     {strings.Replace(issuer.URL, "https", "http", 1) + "0/keys", ""},
		"redirect elsewhere": {"", stranger.URL + "/keys"},
	} {
		mu.Lock()
		keysAt, redirect = elsewhere[0], elsewhere[1]
		mu.Unlock()
		pod := serve()
		pod.token = issuer.token(t, nil)
		if answer := pod.want(t, 503, "GET", path, ""); strings.Contains(answer, "its own") {
			t.Errorf("%s: %s", name, answer)
		}
	}
	mu.Lock()
	keysAt, redirect = "", ""
	mu.Unlock()
	pod := serve()
	pod.token = issuer.token(t, nil)
	pod.want(t, 200, "GET", path, "")
	before := keys.Load()
	foreign := newOIDCIssuer(t)
	foreign.URL = issuer.URL
	began := time.Now()
	for range 20 {
		pod.token = foreign.token(t, nil)
		pod.want(t, 401, "GET", path, "")
		foreign.newKey(t)
	}
	if n := keys.Load() - before; n > 1+int32(time.Since(began)/(5*time.Second)) {
		t.Errorf("20 tokens of unknown keys: the issuer was asked %d times in %s", n, time.Since(began))
	}

	// Duplicate claims.
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: issuer.key, KeyID: issuer.keyID()}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, claims := range []string{
		`{"iss":"ISS","sub":"system:serviceaccount:evil:x","aud":"copilot","exp":4000000000,"sub":"system:serviceaccount:prod:puller"}`,
		`{"iss":"ISS","sub":"system:serviceaccount:evil:x","aud":"copilot","exp":4000000000,"SUB":"system:serviceaccount:prod:puller"}`,
		`{"iss":"ISS","Sub":"system:serviceaccount:prod:puller","aud":"copilot","exp":4000000000}`,
		"{\"iss\":\"ISS\",\"sub\":\"system:serviceaccount:evil:x\",\"aud\":\"copilot\",\"exp\":4000000000,\"\u017fub\":\"system:serviceaccount:prod:puller\"}",
	} {
		signed, err := signer.Sign([]byte(strings.Replace(claims, "ISS", issuer.URL, 1)))
		if err != nil {
			t.Fatal(err)
		}
		if pod.token, err = signed.CompactSerialize(); err != nil {
			t.Fatal(err)
		}
		pod.want(t, 401, "GET", path, "")
	}
	if strangers.Load() > 0 {
		t.Error("a stranger was asked")
	}
}

package copilot_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/ctrlplane/pilot/certfile/certtest"
	"github.com/ctrlplane/pilot/copilot"
)

// freeAddress returns a loopback address on which nobody listens.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func writeFile(t *testing.T, name, text string) string {
	t.Helper()
	if err := os.WriteFile(name+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		t.Fatal(err)
	}
	return name
}

// remote is somebody who asks a broker over TLS.
type remote struct {
	base   string
	client http.Client
	token  string
}

func newRemote(t *testing.T, address string, ca *certtest.Authority, files *certtest.Files) *remote {
	t.Helper()
	conf := &tls.Config{RootCAs: ca.Pool()}
	if files != nil {
		pair, err := tls.LoadX509KeyPair(files.Cert, files.Key)
		if err != nil {
			t.Fatal(err)
		}
		conf.Certificates = []tls.Certificate{pair}
	}
	return &remote{base: "https://" + address, client: http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{TLSClientConfig: conf, DisableKeepAlives: true}}}
}

func (r *remote) do(t *testing.T, method, path, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequest(method, r.base+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if r.token != "" {
		req.Header.Set("Authorization", "Bearer "+r.token)
	}
	resp, err := r.client.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func (r *remote) want(t *testing.T, status int, method, path, body string) string {
	t.Helper()
	got, answer := r.do(t, method, path, body)
	if got != status {
		t.Errorf("%s %s: %d %s, want %d", method, path, got, answer, status)
	}
	return answer
}

func spiffe(path string) x509.Certificate {
	return x509.Certificate{URIs: []*url.URL{{Scheme: "spiffe", Host: "example.com", Path: path}}}
}

const accessPolicy = `
[[rule]]
identities = ["spiffe://example.com/node/*"]
keks = ["team-*", "later"]
actions = ["export", "unwrap"]

[[rule]]
identities = ["spiffe://example.com/ci/*"]
keks = ["team-a"]
actions = ["wrap"]

[[rule]]
identities = ["spiffe://example.com/admin"]
keks = ["team-*"]
actions = ["admin"]

[[rule]]
identities = ["cluster:system:serviceaccount:*:puller"]
keks = ["team-a"]
actions = ["export"]
`

// TestAccess has several identities ask, and takes rights away from them.
func TestAccess(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil, "team-b": nil, "secret": nil})
	ca, other := certtest.NewAuthority(t), certtest.NewAuthority(t)
	server := ca.Issue(t, x509.Certificate{})
	address := freeAddress(t)
	policyFile := writeFile(t, filepath.Join(dir, "policy.toml"), accessPolicy)
	clientCA := writeFile(t, filepath.Join(dir, "clients.pem"), read(t, ca.File))
	serve(t, dir, copilot.Config{
		Listen: []string{address}, TLSCert: server.Cert, TLSKey: server.Key, TLSClientCA: clientCA, Policy: policyFile,
	})
	as := func(ca *certtest.Authority, template x509.Certificate) *remote {
		files := ca.Issue(t, template)
		return newRemote(t, address, ca, &files)
	}
	node, ci, admin := as(ca, spiffe("/node/7")), as(ca, spiffe("/ci/1")), as(ca, spiffe("/admin"))
	stranger := as(ca, x509.Certificate{DNSNames: []string{"stranger.example.com"}})

	node.want(t, 200, "GET", "/api/v2/keks/team-a/key", "")
	node.want(t, 200, "GET", "/api/v1/key/team-a", "")
	node.want(t, 403, "POST", "/api/v2/keks/team-a/wrap", `{"plaintext":"AAAA"}`)
	node.want(t, 403, "POST", "/api/v2/keks/team-a/rotate", "")
	node.want(t, 404, "GET", "/api/v2/keks/team-c/key", "")
	ci.want(t, 409, "GET", "/api/v2/keks/team-a/key", "")
	wrapped := ci.want(t, 200, "POST", "/api/v2/keks/team-a/wrap", `{"plaintext":"AAAA"}`)
	ci.want(t, 403, "POST", "/api/v2/keks/team-a/unwrap", wrapped)
	ci.want(t, 403, "GET", "/api/v1/key/team-a", "")
	admin.want(t, 403, "GET", "/api/v2/keks/team-a/key", "")
	admin.want(t, 200, "POST", "/api/v2/keks/team-a/rotate", "")
	admin.want(t, 200, "POST", "/api/v2/keks", `{"id":"team-c"}`)
	admin.want(t, 403, "POST", "/api/v2/keks", `{"id":"other"}`)
	if list := admin.want(t, 200, "GET", "/api/v2/keks", ""); strings.Contains(list, "secret") || strings.Count(list, `"id"`) != 3 {
		t.Errorf("the admin sees %s", list)
	}
	if list := stranger.want(t, 200, "GET", "/api/v2/keks", ""); list != "[]" {
		t.Errorf("the stranger sees %s", list)
	}
	if e := lastAudited(t, dir); e.Who != "dns:stranger.example.com" {
		t.Errorf("audited %+v", e)
	}

	// To whoever has no right, what is there and what is not look the same.
	for _, who := range []*remote{stranger, node, admin} {
		for _, path := range []string{"/api/v2/keks/%s", "/api/v2/keks/%s/key", "/api/v2/keks/%s/key?version=1", "/api/v2/keks/%s/key?version=7", "/api/v1/key/%s"} {
			same := func(id string) string {
				return withoutRequest(who.want(t, 403, "GET", fmt.Sprintf(path, id), ""))
			}
			if a, b := same("secret"), same("absent"); a != b {
				t.Errorf("%s: %s\n%s", path, a, b)
			}
		}
		for _, path := range []string{"/api/v2/keks/%s/rotate", "/api/v2/keks/%s/wrap", "/api/v2/keks/%s/unwrap", "/api/v2/keks/%s/revoke"} {
			same := func(id string) string {
				return withoutRequest(who.want(t, 403, "POST", fmt.Sprintf(path, id), ""))
			}
			if a, b := same("secret"), same("absent"); a != b {
				t.Errorf("%s: %s\n%s", path, a, b)
			}
		}
	}
	if e := lastAudited(t, dir); e.Verdict != "denied" || !strings.Contains(e.Reason, "no rule of") || !strings.Contains(e.Reason, "absent") {
		t.Errorf("audited %+v", e)
	}

	// Revoked, for one of two nodes.
	other7 := as(ca, spiffe("/node/8"))
	admin.want(t, 200, "POST", "/api/v2/keks/team-a/revoke", `{"identity":"spiffe://example.com/node/7"}`)
	node.want(t, 403, "GET", "/api/v2/keks/team-a/key", "")
	if e := lastAudited(t, dir); e.Reason != "the KEK was revoked for spiffe://example.com/node/7" {
		t.Errorf("audited %+v", e)
	}
	node.want(t, 403, "GET", "/api/v1/key/team-a", "")
	if list := node.want(t, 200, "GET", "/api/v2/keks", ""); strings.Contains(list, "team-a") || !strings.Contains(list, "team-b") {
		t.Errorf("the revoked node sees %s", list)
	}
	if info := other7.want(t, 200, "GET", "/api/v2/keks/team-a", ""); strings.Contains(info, "revoked") {
		t.Errorf("another node sees %s", info)
	}
	node.want(t, 200, "GET", "/api/v2/keks/team-b/key", "")
	other7.want(t, 200, "GET", "/api/v2/keks/team-a/key", "")
	admin.want(t, 200, "POST", "/api/v2/keks/team-a/reinstate", `{"identity":"spiffe://example.com/node/7"}`)
	node.want(t, 200, "GET", "/api/v2/keks/team-a/key", "")

	// Disabled.
	admin.want(t, 200, "POST", "/api/v2/keks/team-a/disable", `{"version":1}`)
	node.want(t, 403, "GET", "/api/v2/keks/team-a/key?version=1", "")
	node.want(t, 200, "GET", "/api/v2/keks/team-a/key?version=2", "")
	admin.want(t, 200, "POST", "/api/v2/keks/team-a/enable", "")

	// A policy that is broken changes nothing; another one counts soon.
	writeFile(t, policyFile, "[[rule]\n")
	time.Sleep(2500 * time.Millisecond)
	node.want(t, 200, "GET", "/api/v2/keks/team-a/key", "")
	if text := request2(t, filepath.Join(dir, "admin.sock"), "/metrics"); !strings.Contains(text, "copilot_policy_usable 0") {
		t.Error("the metrics do not tell that the policy can't be used")
	}
	writeFile(t, policyFile, strings.ReplaceAll(accessPolicy, `"team-*", "later"`, `"later"`))
	eventually(t, func() bool { status, _ := node.do(t, "GET", "/api/v2/keks/team-a/key", ""); return status == 403 })
	if text := request2(t, filepath.Join(dir, "admin.sock"), "/metrics"); !strings.Contains(text, "copilot_policy_usable 1") {
		t.Error("the metrics do not tell that the policy can be used")
	}

	// The CA is replaced while the broker runs.
	for _, foreign := range []*remote{as(other, spiffe("/admin")), newRemote(t, address, ca, nil)} {
		foreign.client.Transport.(*http.Transport).TLSClientConfig.RootCAs = ca.Pool()
		if status, text := foreign.do(t, "GET", "/api/v2/keks", ""); status != 0 || !strings.Contains(text, "certificate") {
			t.Errorf("a foreign certificate: %d %s", status, text)
		}
	}
	writeFile(t, clientCA, read(t, other.File))
	if status, _ := admin.do(t, "GET", "/api/v2/keks", ""); status != 0 {
		t.Errorf("a certificate of the CA before: %d", status)
	}
	replaced := as(other, spiffe("/admin"))
	replaced.client.Transport.(*http.Transport).TLSClientConfig.RootCAs = ca.Pool()
	replaced.want(t, 200, "GET", "/api/v2/keks", "")
	writeFile(t, clientCA, "nonsense")
	replaced.want(t, 200, "GET", "/api/v2/keks", "")
}

// withoutRequest returns a problem without the request's id.
func withoutRequest(problem string) string {
	var p map[string]any
	if json.Unmarshal([]byte(problem), &p) != nil {
		return problem
	}
	delete(p, "request")
	return fmt.Sprint(p)
}

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func eventually(t *testing.T, ok func() bool) {
	t.Helper()
	for range 150 {
		if ok() {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Error("it does not come to that")
}

func request2(t *testing.T, socket, path string) string {
	t.Helper()
	_, body := request(t, "unix://"+socket, "GET", path, "")
	return body
}

// TestTwoSPIFFEIDs refuses a certificate that does not say who it is.
func TestTwoSPIFFEIDs(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	ca := certtest.NewAuthority(t)
	server := ca.Issue(t, x509.Certificate{})
	address := freeAddress(t)
	serve(t, dir, copilot.Config{
		Listen: []string{address}, TLSCert: server.Cert, TLSKey: server.Key, TLSClientCA: ca.File,
		Policy: writeFile(t, filepath.Join(dir, "policy.toml"), accessPolicy),
	})
	two := spiffe("/node/7")
	two.URIs = append(two.URIs, &url.URL{Scheme: "spiffe", Host: "example.com", Path: "/admin"})
	for name, template := range map[string]x509.Certificate{"two SPIFFE IDs": two, "it has no SPIFFE ID": {}} {
		files := ca.Issue(t, template)
		if answer := newRemote(t, address, ca, &files).want(t, 401, "GET", "/api/v2/keks/team-a/key", ""); !strings.Contains(answer, name) {
			t.Errorf("%s: %s", name, answer)
		}
	}
}

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

// token returns a token like those that Kubernetes projects into pods, with
// claims changed.
func (i *oidcIssuer) token(t *testing.T, change func(*jwt.Claims)) string {
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
	token, err := jwt.Signed(signer).Claims(claims).Claims(map[string]any{
		"kubernetes.io": map[string]any{"namespace": "prod", "serviceaccount": map[string]string{"name": "puller", "uid": "1"}},
	}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func TestTokens(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	ca := certtest.NewAuthority(t)
	server := ca.Issue(t, x509.Certificate{})
	issuer, foreign := newOIDCIssuer(t), newOIDCIssuer(t)
	issuer.down = true
	issuer.bearer = "Bearer its own"
	issuerCA := writeFile(t, filepath.Join(dir, "issuer.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: issuer.Certificate().Raw})))
	tokenFile := writeFile(t, filepath.Join(dir, "token"), "its own\n")
	address := freeAddress(t)
	serve(t, dir, copilot.Config{
		Listen: []string{address}, TLSCert: server.Cert, TLSKey: server.Key, TLSClientCA: ca.File,
		Policy:  writeFile(t, filepath.Join(dir, "policy.toml"), accessPolicy),
		Issuers: map[string]copilot.Issuer{"cluster": {URL: issuer.URL, Audience: "copilot", CA: issuerCA, TokenFile: tokenFile}},
	})
	pod := newRemote(t, address, ca, nil)
	const path = "/api/v2/keks/team-a/key?version=1"
	if answer := pod.want(t, 401, "GET", path, ""); !strings.Contains(answer, "show a client certificate or a bearer token") {
		t.Error(answer)
	}
	pod.token = issuer.token(t, nil)
	for range 3 {
		if answer := pod.want(t, 503, "GET", path, ""); !strings.Contains(answer, "the keys of the token's issuer can't be had") || strings.Contains(answer, issuer.URL) {
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
		"of a foreign issuer": {foreign.token(t, nil), "not one of the broker's"},
		"signed by another":   {foreign.token(t, func(c *jwt.Claims) { c.Issuer = issuer.URL }), "failed to verify"},
		"changed":             {good[:len(good)-6] + "AAAAAA", "failed to verify"},
		"unsigned":            {none, "token of issuer cluster"},
		"no token":            {"abc", "no JSON web token"},
		"three parts":         {"a.b.c", "no JSON web token"},
		"10 KB":               {strings.Repeat("x", 17<<10), "more than 16384 bytes"},
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
	// Clocks may be some minutes apart.
	pod.token = issuer.token(t, func(c *jwt.Claims) { c.NotBefore = jwt.NewNumericDate(time.Now().Add(time.Minute)) })
	pod.want(t, 200, "GET", path, "")
	// A bad token is not made good by a certificate.
	files := ca.Issue(t, spiffe("/node/7"))
	both := newRemote(t, address, ca, &files)
	both.want(t, 200, "GET", path, "")
	both.token = none
	both.want(t, 401, "GET", path, "")
	// The issuer has new keys.
	issuer.newKey(t)
	pod.token = issuer.token(t, nil)
	pod.want(t, 200, "GET", path, "")
	pod.token = issuer.token(t, func(c *jwt.Claims) { c.Subject = "system:serviceaccount:prod:other" })
	pod.want(t, 403, "GET", path, "")
	log := read(t, filepath.Join(dir, "audit.log"))
	if strings.Contains(log, good[len(good)-20:]) {
		t.Error("a token is in the audit log")
	}
}

// jwtNone returns a token that says that it is not signed.
func jwtNone(token string) string {
	parts := strings.Split(token, ".")
	return "eyJhbGciOiJub25lIn0." + parts[1] + "."
}

// TestRateLimit asks more often than the policy lets.
func TestRateLimit(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	url := serve(t, dir, copilot.Config{Policy: writeFile(t, filepath.Join(dir, "policy.toml"), `
[[rule]]
identities = ["uid:*"]
keks = ["**"]
actions = ["export"]
[[limit]]
identities = ["uid:*"]
per-second = 1
burst = 5
`)})
	before := len(audited(t, dir))
	counts := make(map[int]int)
	for range 50 {
		status, body := request(t, url, "GET", "/api/v2/keks/team-a/key", "")
		counts[status]++
		if status == 429 && !strings.Contains(body, "too many requests: try again in") {
			t.Error(body)
		}
	}
	if counts[200] < 5 || counts[200] > 8 || counts[200]+counts[429] != 50 {
		t.Errorf("answers: %v", counts)
	}
	if lines := len(audited(t, dir)) - before; lines > counts[200]+4 {
		t.Errorf("%d lines in the audit log", lines)
	}
	// Those of the admin socket are not limited.
	for range 20 {
		if status, _ := request(t, "unix://"+filepath.Join(dir, "admin.sock"), "GET", "/api/v2/keks/team-a", ""); status != 200 {
			t.Errorf("admin: %d", status)
		}
	}
}

// TestWrapLimit wraps more keys than a version may.
func TestWrapLimit(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	serve(t, dir, copilot.Config{WrapLimit: 3000})
	url := "unix://" + filepath.Join(dir, "admin.sock") // which has no rate limit
	version := func(verb, body string) int {
		t.Helper()
		method := "GET"
		if body != "" {
			method = "POST"
		}
		status, answer := request(t, url, method, "/api/v2/keks/team-a/"+verb, body)
		var v struct{ Version int }
		if status != 200 || json.Unmarshal([]byte(answer), &v) != nil {
			t.Fatalf("%s: %d %s", verb, status, answer)
		}
		return v.Version
	}
	if status, answer := request(t, url, "GET", "/api/v2/keks/team-a/key?wraps=1025", ""); status != 400 || !strings.Contains(answer, "at most 1024") {
		t.Errorf("many wraps at once: %d %s", status, answer)
	}
	for range 2 {
		if v := version("key", ""); v != 1 { // 1024 wraps each
			t.Errorf("version %d", v)
		}
	}
	for range 3000 - 2048 {
		if v := version("wrap", `{"plaintext":"AAAA"}`); v != 1 {
			t.Fatalf("version %d", v)
		}
	}
	if v := version("wrap", `{"plaintext":"AAAA"}`); v != 2 {
		t.Errorf("version %d wraps more than it may", v)
	}
	if v := version("key", ""); v != 2 {
		t.Errorf("version %d", v)
	}
	var rotated []string
	for _, e := range audited(t, dir) {
		if e.Action == "rotate" {
			rotated = append(rotated, fmt.Sprintf("%s %d %s", e.Who, e.Version, e.Reason))
		}
	}
	if len(rotated) != 1 || !strings.HasPrefix(rotated[0], "copilot 2 version 1 has wrapped as many keys as it may, 3000, the last for uid:") {
		t.Errorf("audited %q", rotated)
	}
	keys := open(t, dir)
	defer keys.Close()
	info, err := keys.Get("team-a")
	if err != nil || info.Version != 2 || info.Versions[0].Wraps < 3000 || info.Versions[1].Wraps != 1025 {
		t.Errorf("%+v, %v", info, err)
	}
}

// TestExpiredMeanwhile goes on over a connection for longer than its certificate
// holds.
func TestExpiredMeanwhile(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	ca := certtest.NewAuthority(t)
	server := ca.Issue(t, x509.Certificate{})
	address := freeAddress(t)
	serve(t, dir, copilot.Config{
		Listen: []string{address}, TLSCert: server.Cert, TLSKey: server.Key, TLSClientCA: ca.File,
		Policy: writeFile(t, filepath.Join(dir, "policy.toml"), accessPolicy),
	})
	short := spiffe("/node/7")
	short.NotAfter = time.Now().Add(3 * time.Second)
	files := ca.Issue(t, short)
	node := newRemote(t, address, ca, &files)
	node.client.Transport.(*http.Transport).DisableKeepAlives = false
	node.want(t, 200, "GET", "/api/v2/keks/team-a/key", "")
	time.Sleep(time.Until(short.NotAfter) + time.Second)
	if answer := node.want(t, 401, "GET", "/api/v2/keks/team-a/key", ""); !strings.Contains(answer, "expired") {
		t.Error(answer)
	}
}

// TestUnknownCallers bounds what those write into the audit log who say nothing of
// who they are.
func TestUnknownCallers(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	ca := certtest.NewAuthority(t)
	server := ca.Issue(t, x509.Certificate{})
	issuer := newOIDCIssuer(t)
	address := freeAddress(t)
	serve(t, dir, copilot.Config{
		Listen: []string{address}, TLSCert: server.Cert, TLSKey: server.Key,
		Issuers: map[string]copilot.Issuer{"cluster": {URL: issuer.URL, Audience: "copilot"}},
	})
	unknown := newRemote(t, address, ca, nil)
	unknown.token = "a.b.c"
	unknown.client.Transport.(*http.Transport).DisableKeepAlives = false
	begin, before := time.Now(), len(audited(t, dir))
	counts := make(map[int]int)
	for range 500 {
		status, _ := unknown.do(t, "GET", "/api/v2/keks/team-a/key", "")
		counts[status]++
	}
	most := 20 * (int(time.Since(begin)/time.Second) + 2)
	if lines := len(audited(t, dir)) - before; lines < 1 || lines > most || counts[401] == 0 || counts[429] == 0 || counts[401]+counts[429] != 500 {
		t.Errorf("%d lines, at most %d: %v", lines, most, counts)
	}
}

// TestUnwrapAnnotation has the broker unwrap what pilot wrapped itself.
func TestUnwrapAnnotation(t *testing.T) {
	dir := t.TempDir()
	key := bytes.Repeat([]byte("k"), 32)
	create(t, dir, map[string][]byte{"team/a": bytes.Clone(key), "team-b": bytes.Clone(key)})
	url := serve(t, dir, copilot.Config{})
	iv, sealed := sealAnnotation(t, key, `{"kekId":"team/a","kekVersion":1,"method":"A256GCMKW"}`, []byte("a layer key"))
	body := func(version int, iv, sealed []byte, method string) string {
		b, err := json.Marshal(map[string]any{"version": version, "iv": iv, "wrappedKey": sealed, "method": method})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	unwrap := func(id, body string) (int, string) {
		t.Helper()
		return request(t, url, "POST", "/api/v2/keks/"+id+"/unwrap", body)
	}
	if status, answer := unwrap("team%2Fa", body(1, iv, sealed, "A256GCMKW")); status != 200 || answer != `{"plaintext":"YSBsYXllciBrZXk="}` {
		t.Errorf("%d %s", status, answer)
	}
	if status, _ := unwrap("team-b", body(1, iv, sealed, "A256GCMKW")); status != 400 {
		t.Errorf("with another KEK that has the same key: %d", status)
	}
	for name, b := range map[string]string{
		"an iv of 16 bytes": body(1, append(iv, 1, 2, 3, 4), sealed, "A256GCMKW"),
		"no method":         body(1, iv, sealed, ""),
		"another method":    body(1, iv, sealed, "AES-GCM"),
		"changed":           body(1, iv, append([]byte{sealed[0] ^ 1}, sealed[1:]...), "A256GCMKW"),
		"too short":         body(1, iv, nil, "A256GCMKW"),
		"no iv":             body(1, nil, sealed, "A256GCMKW"),
	} {
		if status, answer := unwrap("team%2Fa", b); status != 400 {
			t.Errorf("%s: %d %s", name, status, answer)
		}
	}
}

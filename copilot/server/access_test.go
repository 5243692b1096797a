package server_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	copilot "github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/internal/certfile/certtest"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

func writeFile(t testing.TB, name, text string) string {
	t.Helper()
	if err := os.WriteFile(name+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		t.Fatal(err)
	}
	return name
}

// remote is a client of a broker, over TLS.
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
	return &remote{base: "https://" + address, client: http.Client{Timeout: time.Minute, Transport: &http.Transport{TLSClientConfig: conf, DisableKeepAlives: true}}}
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

// serveTLS runs a broker that answers TLS with a certificate of ca, and returns
// its HOST:PORT.
func serveTLS(t testing.TB, dir string, ca *certtest.Authority, conf copilot.Config) string {
	t.Helper()
	server, address := ca.Issue(t, x509.Certificate{}), loopbacktest.FreeAddress(t)
	conf.Listen, conf.TLSCert, conf.TLSKey = []string{address}, server.Cert, server.Key
	serve(t, dir, conf)
	return address
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
`

// tokenPolicy is accessPolicy where tokens of an issuer "cluster" are accepted.
const tokenPolicy = accessPolicy + `
[[rule]]
identities = ["cluster:system:serviceaccount:*:puller"]
keks = ["team-a"]
actions = ["export"]
`

// TestAccess sends requests of several identities, and takes rights away from them.
func TestAccess(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil, "team-b": nil, "secret": nil})
	ca, other := certtest.NewAuthority(t), certtest.NewAuthority(t)
	policyFile := writeFile(t, filepath.Join(dir, "policy.toml"), accessPolicy)
	clientCA := writeFile(t, filepath.Join(dir, "clients.pem"), read(t, ca.File))
	address := serveTLS(t, dir, ca, copilot.Config{TLSClientCA: clientCA, Policy: policyFile})
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

	// For callers without rights, KEKs that exist and those that don't look the same.
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

	// A broken policy changes nothing. A valid one takes effect soon.
	writeFile(t, policyFile, "[[rule]\n")
	eventually(t, func() bool { return strings.Contains(metricsOf(t, dir), "copilot_policy_usable 0") })
	node.want(t, 200, "GET", "/api/v2/keks/team-a/key", "")
	writeFile(t, policyFile, strings.ReplaceAll(accessPolicy, `"team-*", "later"`, `"later"`))
	eventually(t, func() bool { status, _ := node.do(t, "GET", "/api/v2/keks/team-a/key", ""); return status == 403 })
	eventually(t, func() bool { return strings.Contains(metricsOf(t, dir), "copilot_policy_usable 1") })

	// The CA is replaced while the broker runs.
	for _, foreign := range []*remote{as(other, spiffe("/admin")), newRemote(t, address, ca, nil)} {
		foreign.client.Transport.(*http.Transport).TLSClientConfig.RootCAs = ca.Pool()
		eventually(t, func() bool { // the broker's alert may come too late to be read
			status, text := foreign.do(t, "GET", "/api/v2/keks", "")
			if status != 0 {
				t.Errorf("a foreign certificate: %d %s", status, text)
			}
			return strings.Contains(text, "certificate")
		})
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
	for range 1200 { // a minute
		if ok() {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Error("it does not come to that")
}

// metricsOf returns a broker's metrics.
func metricsOf(t *testing.T, dir string) string {
	t.Helper()
	_, body := request(t, "unix://"+filepath.Join(dir, "admin.sock"), "GET", "/metrics", "")
	return body
}

// TestCertificateNamesNobody shows certificates that do not name one client, in one
// spelling.
func TestCertificateNamesNobody(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	ca := certtest.NewAuthority(t)
	address := serveTLS(t, dir, ca, copilot.Config{TLSClientCA: ca.File, Policy: writeFile(t, filepath.Join(dir, "policy.toml"), accessPolicy)})
	two := spiffe("/node/7")
	two.URIs = append(two.URIs, &url.URL{Scheme: "spiffe", Host: "example.com", Path: "/admin"})
	odd := func(u string) x509.Certificate {
		parsed, err := url.Parse(u)
		if err != nil {
			t.Fatal(err)
		}
		return x509.Certificate{URIs: []*url.URL{parsed}}
	}
	authority := spiffe("/node/7")
	authority.IsCA, authority.BasicConstraintsValid = true, true
	for name, template := range map[string]x509.Certificate{
		"two SPIFFE IDs": two, "it has no SPIFFE ID": {}, "a CA's": authority,
		"is not a host name": {DNSNames: []string{"*.example.com"}},
		"trust domain's":     odd("spiffe://example.com"),
		"can't be used":      odd("spiffe://Example.com/node/7"),
		"SPIFFE ID":          odd("spiffe://example.com/node/7?x=1"),
		"SPIFFE":             odd("spiffe://example.com/node/%37"),
		"the certificate's":  odd("SPIFFE://example.com/node/7#x"),
	} {
		files := ca.Issue(t, template)
		if answer := newRemote(t, address, ca, &files).want(t, 401, "GET", "/api/v2/keks/team-a/key", ""); !strings.Contains(answer, name) {
			t.Errorf("%s: %s", name, answer)
		}
	}
}

// TestRevocationTakesAnySpelling revokes a KEK for a host name in another spelling
// than the certificate's.
func TestRevocationTakesAnySpelling(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	ca := certtest.NewAuthority(t)
	address := serveTLS(t, dir, ca, copilot.Config{TLSClientCA: ca.File, Policy: writeFile(t, filepath.Join(dir, "policy.toml"),
		"[[rule]]\nidentities = ['dns:CI.example.com']\nkeks = ['team-a']\nactions = ['export']\n")})
	files := ca.Issue(t, x509.Certificate{DNSNames: []string{"ci.EXAMPLE.com."}})
	client := newRemote(t, address, ca, &files)
	client.want(t, 200, "GET", "/api/v2/keks/team-a/key", "")
	admin := "unix://" + filepath.Join(dir, "admin.sock")
	for identity, want := range map[string]int{`dns:ci.Example.COM.`: 200, `worker-7`: 400, `spiffe://Example.com/node/7`: 400} {
		if status, body := request(t, admin, "POST", "/api/v2/keks/team-a/revoke", `{"identity":"`+identity+`"}`); status != want {
			t.Errorf("revoke for %s: %d %s", identity, status, body)
		}
	}
	client.want(t, 403, "GET", "/api/v2/keks/team-a/key", "")
	if status, body := request(t, admin, "POST", "/api/v2/keks/team-a/reinstate", `{"identity":"dns:CI.EXAMPLE.COM"}`); status != 200 {
		t.Errorf("reinstate: %d %s", status, body)
	}
	client.want(t, 200, "GET", "/api/v2/keks/team-a/key", "")
}

// TestCAIsTrustedForItsOwnTrustDomainOnly has two CAs in one file: each names its own clients only.
func TestCAIsTrustedForItsOwnTrustDomainOnly(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	own, other := certtest.NewTrustDomain(t, "example.com"), certtest.NewTrustDomain(t, "example.org")
	both := ""
	for _, ca := range []*certtest.Authority{own, other} {
		b, err := os.ReadFile(ca.File)
		if err != nil {
			t.Fatal(err)
		}
		both += string(b)
	}
	address := serveTLS(t, dir, own, copilot.Config{TLSClientCA: writeFile(t, filepath.Join(dir, "both.pem"), both),
		Policy: writeFile(t, filepath.Join(dir, "policy.toml"), accessPolicy)})
	good, bad := own.Issue(t, spiffe("/node/7")), other.Issue(t, spiffe("/node/7"))
	newRemote(t, address, own, &good).want(t, 200, "GET", "/api/v2/keks/team-a/key", "")
	if answer := newRemote(t, address, own, &bad).want(t, 401, "GET", "/api/v2/keks/team-a/key", ""); !strings.Contains(answer, "its CA for trust domain example.org") {
		t.Error(answer)
	}
}

// TestExpiredMeanwhile connects with a valid certificate, and sends a request after it has
// expired.
func TestExpiredMeanwhile(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	ca := certtest.NewAuthority(t)
	address := serveTLS(t, dir, ca, copilot.Config{TLSClientCA: ca.File, Policy: writeFile(t, filepath.Join(dir, "policy.toml"), accessPolicy)})
	// A machine that is too slow to connect in time gets more time.
	for hold := 2 * time.Second; ; hold *= 2 {
		short := spiffe("/node/7")
		short.NotAfter = time.Now().Add(hold).Truncate(time.Second) // as the certificate has it
		files := ca.Issue(t, short)
		node := newRemote(t, address, ca, &files)
		status, answer := node.do(t, "GET", "/api/v2/keks/team-a/key", "")
		// The broker closes a connection without a request after ten seconds.
		time.Sleep(time.Until(short.NotAfter.Add(-min(hold/2, 5*time.Second))))
		transport := node.client.Transport.(*http.Transport)
		dialer := tls.Dialer{Config: transport.TLSClientConfig}
		conn, err := dialer.DialContext(t.Context(), "tcp", address)
		if time.Now().After(short.NotAfter) && hold < 2*time.Minute {
			continue
		}
		if status != 200 || err != nil {
			t.Fatalf("before it expires: %d %s, %v", status, answer, err)
		}
		time.Sleep(time.Until(short.NotAfter) + time.Second)
		transport.DialTLSContext = func(context.Context, string, string) (net.Conn, error) { return conn, nil }
		status, answer = node.do(t, "GET", "/api/v2/keks/team-a/key", "")
		if status == 0 && hold < 2*time.Minute {
			continue // the broker looked at the certificate when it had expired
		}
		if status != 401 || !strings.Contains(answer, "expired") {
			t.Errorf("%d %s", status, answer)
		}
		return
	}
}

// TestCertificateEnds sends requests with a certificate that expires soon: each needs a new
// connection, since the certificate may have been replaced.
func TestCertificateEnds(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	ca := certtest.NewAuthority(t)
	address := serveTLS(t, dir, ca, copilot.Config{TLSClientCA: ca.File, Policy: writeFile(t, filepath.Join(dir, "policy.toml"), accessPolicy)})
	for _, test := range []struct {
		hold        time.Duration
		http2       bool
		connections int
	}{{time.Minute, true, 3}, {time.Minute, false, 3}, {time.Hour, true, 1}, {time.Hour, false, 1}} {
		template := spiffe("/node/7")
		template.NotAfter = time.Now().Add(test.hold)
		files := ca.Issue(t, template)
		node := newRemote(t, address, ca, &files)
		transport := node.client.Transport.(*http.Transport)
		transport.DisableKeepAlives, transport.ForceAttemptHTTP2 = false, test.http2
		connections := 0
		transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			connections++
			return new(net.Dialer).DialContext(ctx, network, address)
		}
		// net/http makes another connection if its own goroutine is late by 50 ms.
		for tries := 0; tries < 5 && connections != test.connections; tries++ {
			connections = 0
			for range 3 {
				node.want(t, 200, "GET", "/api/v2/keks/team-a/key", "")
			}
			transport.CloseIdleConnections()
		}
		if connections != test.connections {
			t.Errorf("a certificate for %s, HTTP/2 %t: %d connections, want %d", test.hold, test.http2, connections, test.connections)
		}
	}
}

package server_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/gorillamux"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/pki"
	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// TestAnswersFitTheOpenAPIDocument makes requests of each kind, good and bad, and checks that each
// answer is one of those in the document, in its shape.
func TestAnswersFitTheOpenAPIDocument(t *testing.T) {
	text, err := os.ReadFile("openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := openapi3.NewLoader().LoadFromData(text)
	if err != nil {
		t.Fatal(err)
	}
	if err := doc.Validate(t.Context()); err != nil {
		t.Fatal(err)
	}
	router, err := gorillamux.NewRouter(doc)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team/a": nil, "team-b": nil, "short": bytes.Repeat([]byte{1}, 16)})
	policy := filepath.Join(dir, "policy.toml")
	if err := os.WriteFile(policy, []byte(`
[[rule]]
identities = ["uid:*", "spiffe://example.com/node/*"]
keks = ["team-b"]
actions = ["wrap"]
[[limit]]
identities = ["uid:*"]
per-second = 0.001
burst = 8
`), 0o600); err != nil {
		t.Fatal(err)
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	ca, pair, renew := requestRenewal(t, dir)
	if err := ca.IssueSigner(dir, time.Hour, nil); err != nil {
		t.Fatal(err)
	}
	store, err := keystore.Open(t.Context(), dir, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.ChangeApproval(t.Context(), "abcdefghijkl", func(a *keystore.Approval, _ bool) error {
		a.Operation, a.KEK, a.Content, a.By, a.At, a.Expires = "destroy", "team-b", "version 1", "uid:4242", time.Now(), time.Now().Add(time.Hour)
		a.Owner = new(bool)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	// node is the address for the holder of a certificate.
	node := loopbacktest.FreeAddress(t)
	public := strings.TrimPrefix(serve(t, dir, server.Config{
		Policy: policy, Listen: []string{node}, TLSCert: in("server.pem"), TLSKey: in("server-key.pem"), TLSClientCA: in("ca.pem"),
		NodeCA: in("ca.pem"), NodeCAKey: in("ca-key.pem"),
		PublicKeysCert: in(pki.SignerCertFile), PublicKeysKey: in(pki.SignerKeyFile),
	}), "unix://")
	admin := filepath.Join(dir, "admin.sock")
	published := http.StatusOK
	if fipstest.Is(fipstest.HPKE) {
		published = http.StatusConflict
	}
	seen := make(map[string]bool)
	wrapped := ""
	for _, test := range []struct {
		socket, method, path, body string
		status                     int
	}{
		{admin, "GET", "/healthz", "", 204},
		{admin, "GET", "/readyz", "", 204},
		{admin, "GET", "/api/v2/openapi.json", "", 200},
		{admin, "GET", "/api/v1/key/team-b", "", 200},
		{admin, "GET", "/api/v1/key/nobody", "", 404},
		{admin, "GET", "/api/v2/keks", "", 200},
		{admin, "POST", "/api/v2/keks", `{"id":"new"}`, 200},
		{admin, "POST", "/api/v2/keks", `{"id":"new"}`, 409},
		{admin, "POST", "/api/v2/keks", `{"id":"imported","key":"a2tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2s="}`, 200},
		{admin, "GET", "/api/v2/keks/team%2Fa", "", 200},
		{admin, "GET", "/api/v2/keks/nobody", "", 404},
		{admin, "GET", "/api/v2/keks/team%2Fa/key", "", 200},
		{admin, "GET", "/api/v2/keks/team%2Fa/key?version=1", "", 200},
		{admin, "GET", "/api/v2/keks/team%2Fa/key?wraps=64", "", 200},
		{admin, "GET", "/api/v2/keks/team%2Fa/key?version=2", "", 404},
		{admin, "GET", "/api/v2/keks/team%2Fa/public", "", published},
		{admin, "GET", "/api/v2/keks/team%2Fa/public?seconds=60", "", published},
		{admin, "GET", "/api/v2/keks/team%2Fa/public?seconds=7200", "", 409},
		{admin, "GET", "/api/v2/keks/short/public", "", 409},
		{admin, "GET", "/api/v2/keks/nobody/public", "", 404},
		{admin, "POST", "/api/v2/keks/team%2Fa/wrap", `{"plaintext":"AAAA"}`, 200},
		{admin, "POST", "/api/v2/keks/short/wrap", `{"plaintext":"AAAA"}`, 400},
		{admin, "POST", "/api/v2/keks/team%2Fa/check", "", 200},
		{admin, "POST", "/api/v2/keks/short/check", "{}", 200}, // it says what is wrong
		{admin, "POST", "/api/v2/keks/short/check", `{"version":1}`, 400},
		{admin, "POST", "/api/v2/keks/nobody/check", "", 404},
		{admin, "POST", "/api/v2/keks/nobody/wrap", `{"plaintext":"AAAA"}`, 404},
		{admin, "POST", "/api/v2/keks/team%2Fa/unwrap", `WRAPPED`, 200},
		{admin, "POST", "/api/v2/keks/team%2Fa/unwrap", `{"version":1,"method":"copilot","wrappedKey":"AAAA"}`, 400},
		{admin, "POST", "/api/v2/keks/team%2Fa/unwrap", `{"version":1,"wrappedKey":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA","method":"A256GCMKW","iv":"AAAAAAAAAAAAAAAA"}`, 400},
		{admin, "POST", "/api/v2/keks/team%2Fa/use", `{"workload":"prod/web"}`, 200},
		{admin, "POST", "/api/v2/keks/team%2Fa/use", `{"workload":"prod/web","version":1}`, 200},
		{admin, "POST", "/api/v2/keks/team%2Fa/use", `{"workload":"prod/web","version":2}`, 404},
		{admin, "POST", "/api/v2/keks/team%2Fa/use", `{"workload":"prod/web","labels":{"tier":"gold"}}`, 200},
		{admin, "POST", "/api/v2/keks/team%2Fa/use", `{"workload":"prod"}`, 400},
		{admin, "POST", "/api/v2/keks/team%2Fa/rotate", "", 200},
		{admin, "POST", "/api/v2/keks/nobody/rotate", "", 404},
		{admin, "POST", "/api/v2/keks/team%2Fa/disable", `{"version":1}`, 200},
		{admin, "POST", "/api/v2/keks/team%2Fa/disable", "", 200},
		{admin, "GET", "/api/v2/keks/team%2Fa/key", "", 403},
		{admin, "POST", "/api/v2/keks/team%2Fa/enable", "", 200},
		{admin, "POST", "/api/v2/keks/team%2Fa/enable", `{"version":7}`, 404},
		{admin, "POST", "/api/v2/keks/team%2Fa/revoke", `{"identity":"dns:x"}`, 200},
		{admin, "GET", "/api/v2/keks/team%2Fa", "", 200},
		{admin, "POST", "/api/v2/keks/team%2Fa/reinstate", `{"identity":"dns:x"}`, 200},
		{admin, "POST", "/api/v2/keks/team%2Fa/reinstate", `{"identity":"dns:x"}`, 409},
		{admin, "POST", "/api/v2/keks/team%2Fa/destroy", `{"version":1}`, 200},
		{admin, "POST", "/api/v2/keks/team%2Fa/destroy", `{"afterSeconds":0}`, 200},
		{admin, "GET", "/api/v2/keks/team%2Fa", "", 200},
		{admin, "GET", "/api/v2/approvals", "", 200},
		{admin, "POST", "/api/v2/approvals/abcdefghijkl/approve", "", 200},
		{admin, "POST", "/api/v2/approvals/abcdefghijkl/approve", "", 409},
		{admin, "POST", "/api/v2/approvals/nobody/approve", "", 404},
		{admin, "GET", "/api/v2/approvals", "", 200},
		{node, "POST", "/api/v2/certificate/renew", string(renew), 200},
		{node, "POST", "/api/v2/certificate/renew", `{"csr":"none"}`, 400},
		{admin, "POST", "/api/v2/certificate/renew", string(renew), 400},
		{public, "GET", "/api/v2/keks/nobody", "", 403},
		{public, "GET", "/api/v2/keks/team%2Fa", "", 403},
		{public, "GET", "/api/v2/keks/team-b", "", 200},
		{public, "GET", "/api/v2/keks/team-b/key", "", 409},
		{public, "POST", "/api/v2/keks/team-b/wrap", `{"plaintext":"AAAA"}`, 200},
		{public, "POST", "/api/v2/keks/team-b/rotate", "", 403},
		{public, "GET", "/api/v2/keks", "", 200},
		{public, "GET", "/api/v2/keks/team-b", "", 200},
		{public, "GET", "/api/v2/keks/team-b", "", 429},
	} {
		name := test.method + " " + test.path
		client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			if test.socket == node {
				return (&tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{pair}}}).DialContext(ctx, "tcp", node)
			}
			return new(net.Dialer).DialContext(ctx, "unix", test.socket)
		}}}
		body := strings.Replace(test.body, "WRAPPED", wrapped, 1)
		req, err := http.NewRequest(test.method, "http://copilot"+test.path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if body != "" {
			req.Header.Set("Content-Type", "application/json")
		}
		route, params := find(t, router, req)
		input := &openapi3filter.RequestValidationInput{
			Request: req, PathParams: params, Route: route,
			Options: &openapi3filter.Options{AuthenticationFunc: openapi3filter.NoopAuthenticationFunc, IncludeResponseStatus: true, SkipSettingDefaults: true},
		}
		if err := openapi3filter.ValidateRequest(t.Context(), input); err != nil {
			t.Errorf("%s: the document does not describe this request: %v", name, err)
		}
		req.Body = io.NopCloser(strings.NewReader(body))
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		answer, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != test.status {
			t.Errorf("%s: %d %s, want %d", name, resp.StatusCode, answer, test.status)
		}
		err = openapi3filter.ValidateResponse(t.Context(), &openapi3filter.ResponseValidationInput{
			RequestValidationInput: input, Status: resp.StatusCode, Header: resp.Header,
			Body: io.NopCloser(bytes.NewReader(answer)), Options: input.Options,
		})
		if err != nil {
			t.Errorf("%s: the document does not describe this answer: %v\n%s", name, err, answer)
		}
		if strings.Contains(string(answer), `"wrappedKey"`) && test.socket == admin {
			wrapped = strings.Replace(string(answer), `"id":"team/a",`, "", 1)
		}
		if resp.StatusCode < 300 || resp.StatusCode == published && strings.HasSuffix(route.Path, "/public") {
			seen[route.Operation.OperationID] = true
		}
	}
	for path, item := range doc.Paths.Map() {
		for method, operation := range item.Operations() {
			if !seen[operation.OperationID] {
				t.Errorf("%s %s was not tried", method, path)
			}
		}
	}
}

func find(t *testing.T, router routers.Router, req *http.Request) (*routers.Route, map[string]string) {
	t.Helper()
	// The router decodes %2F.
	flat := *req
	flat.URL = &url.URL{Scheme: "http", Host: "copilot", Path: strings.ReplaceAll(req.URL.EscapedPath(), "%2F", "-")}
	route, params, err := router.FindRoute(&flat)
	if err != nil {
		t.Fatalf("%s %s is not in the document: %v", req.Method, req.URL, err)
	}
	return route, params
}

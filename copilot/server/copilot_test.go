package server_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/copilot/server/servertest"
)

// serve runs a broker on a store, until the test ends, and returns the address
// of its socket.
func serve(t testing.TB, dir string, conf server.Config) string {
	t.Helper()
	conf.Dir = dir
	return servertest.Serve(t, conf)
}

func open(t testing.TB, dir string) server.Keys {
	t.Helper()
	keys, err := server.OpenKeys(t.Context(), server.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

// request makes a request to a unix socket.
func request(t *testing.T, url, method, path, body string) (int, string) {
	t.Helper()
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("unix", strings.TrimPrefix(url, "unix://"))
	}}}
	req, err := http.NewRequest(method, "http://broker"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// TestClientExportsWrapsAndUnwraps gets KEKs from a real broker, and wraps and unwraps with them.
func TestClientExportsWrapsAndUnwraps(t *testing.T) {
	dir := t.TempDir()
	key := []byte("0123456789abcdef0123456789abcdef")
	keys := open(t, dir)
	for id, k := range map[string][]byte{"team-a": key, "team/b": nil, "short": key[:16]} {
		if _, err := keys.Create(t.Context(), id, k); err != nil {
			t.Fatal(err)
		}
	}
	if err := keys.Close(); err != nil {
		t.Fatal(err)
	}
	url := serve(t, dir, server.Config{})
	c, err := client.New(client.Config{URLs: []string{url}, Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	if kek, err := c.KEK(ctx, "team-a", 0); err != nil || kek.Version != 1 || !bytes.Equal(kek.Key, key) {
		t.Errorf("got %d bytes of version %d, %v", len(kek.Key), kek.Version, err)
	}
	// While the broker runs, keys are managed through it.
	admin := open(t, dir)
	defer admin.Close()
	if info, err := admin.Rotate(t.Context(), "team-a"); err != nil || info.Version != 2 {
		t.Errorf("rotate: %+v, %v", info, err)
	}
	if kek, err := c.KEK(ctx, "team-a", 0); err != nil || kek.Version != 2 || bytes.Equal(kek.Key, key) {
		t.Errorf("after rotation: version %d, %v", kek.Version, err)
	}
	if kek, err := c.KEK(ctx, "team-a", 1); err != nil || !bytes.Equal(kek.Key, key) {
		t.Errorf("the old version: %v", err)
	}
	for id, version := range map[string]int{"nobody": 0, "team-a": 3, "..": 0, strings.Repeat("x", 5000): 0, "eyJr/+==": 0} {
		if _, err := c.KEK(ctx, id, version); !errors.Is(err, client.ErrNotFound) && id != ".." || err == nil {
			t.Errorf("KEK %.20q version %d: %v", id, version, err)
		}
	}

	wrapped, err := c.Wrap(ctx, "team/b", []byte("secret"))
	if err != nil || wrapped.Version != 1 {
		t.Fatalf("wrap: version %d, %v", wrapped.Version, err)
	}
	if got, err := c.Unwrap(ctx, "team/b", wrapped); err != nil || string(got) != "secret" {
		t.Errorf("unwrap: %q, %v", got, err)
	}
	if _, err := c.Unwrap(ctx, "team-a", wrapped); err == nil {
		t.Error("another KEK unwraps it")
	}
	wrapped.Key[len(wrapped.Key)-1] ^= 1
	if _, err := c.Unwrap(ctx, "team/b", wrapped); err == nil {
		t.Error("it unwraps although it was changed")
	}
	if _, err := c.Wrap(ctx, "short", []byte("secret")); err == nil {
		t.Error("a KEK of 16 bytes wraps")
	}

	// The original's API.
	if status, body := request(t, url, "GET", "/api/v1/key/team%2Fb", ""); status != 200 || len(body) != 32 {
		t.Errorf("v1: %d, %d bytes", status, len(body))
	}
	if status, _ := request(t, url, "GET", "/api/v1/key/nobody", ""); status != 404 {
		t.Errorf("v1, unknown: %d", status)
	}
	// The server reads no more than this before it answers and hangs up, and a client that is still
	// writing then may not see the answer.
	const tooMany = 128<<10 + 1
	for _, test := range []struct {
		method, path, body string
		status             int
	}{
		{"POST", "/api/v2/keks", `{"id":"evil"}`, 403}, // admins only
		{"POST", "/api/v2/keks/team-a/rotate", "", 403},
		{"DELETE", "/api/v2/keks/team-a", "", 404},
		{"GET", "/api/v2/keks/team-a/key?version=x", "", 400},  //
		{"GET", "/api/v2/keks/team-a/key?version=-1", "", 400}, //
		{"POST", "/api/v2/keks/team-a/wrap", `{}`, 400},
		{"POST", "/api/v2/keks/team-a/wrap", `{"plaintext":"AA==","more":1}`, 400},
		{"POST", "/api/v2/keks/team-a/wrap", `{"plaintext":"AA=="} x`, 400},
		{"POST", "/api/v2/keks/team-a/wrap", strings.Repeat("x", tooMany), 413},
		{"POST", "/api/v2/keks/team-a/wrap", `{"plaintext":"` + strings.Repeat("A", tooMany) + `"}`, 413},
		{"POST", "/api/v2/keks/team-a/unwrap", `{"version":1,"wrappedKey":"AAAA"}`, 400},
		{"GET", "/", "", 404},
	} {
		status, body := request(t, url, test.method, test.path, test.body)
		var problem struct{ Status int }
		if json.Unmarshal([]byte(body), &problem); status != test.status || problem.Status != status {
			t.Errorf("%s %s: %d %s, want %d", test.method, test.path, status, body, test.status)
		}
	}

	// Everything is in the audit log, and no key.
	log, err := os.ReadFile(filepath.Join(dir, "audit.log"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"action":"import","kek":"team-a","version":1`, `"action":"rotate"`, `"action":"export","kek":"nobody"`, `"verdict":"denied"`, `"action":"unwrap"`, `"action":"other"`, `"who":"uid:0"`} {
		if os.Getuid() == 0 && !strings.Contains(string(log), want) {
			t.Errorf("the audit log lacks %s", want)
		}
	}
	if bytes.Contains(log, key) || bytes.Contains(log, []byte("MDEyMzQ1Njc4OWFiY2RlZj")) {
		t.Error("a key is in the audit log")
	}
	for line := range strings.Lines(string(log)) {
		if !json.Valid([]byte(line)) || len(line) > 4096 {
			t.Errorf("audit log: %.200s", line)
		}
	}
	for _, name := range []string{"keks.db", "master.key", "audit.log", "admin.sock", "s"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
}

// TestNoAudit checks that a request that can't be audited is refused.
func TestNoAudit(t *testing.T) {
	dir := t.TempDir()
	keys := open(t, dir)
	if _, err := keys.Create(t.Context(), "team-a", nil); err != nil {
		t.Fatal(err)
	}
	keys.Close()
	url := serve(t, dir, server.Config{AuditLog: "/dev/full"})
	if status, body := request(t, url, "GET", "/readyz", ""); status != 204 {
		t.Errorf("before it is known: %d, %q", status, body)
	}
	if status, body := request(t, url, "GET", "/api/v1/key/team-a", ""); status != 503 || len(body) == 32 {
		t.Errorf("%d, %q", status, body)
	}
	if status, body := request(t, url, "GET", "/api/v2/keks/team-a/key", ""); status != 503 || !strings.Contains(body, "the audit log can't be written (no space left on device): see copilot's log for request") {
		t.Errorf("%d, %q", status, body)
	}
	if status, body := request(t, url, "GET", "/readyz", ""); status != 503 || !strings.Contains(body, "the audit log can't be written") {
		t.Errorf("readyz: %d, %q", status, body)
	}
}

func TestRefusedAddresses(t *testing.T) {
	for address, want := range map[string]string{
		"0.0.0.0:1": "other machines can connect", "[::]:1": "other machines", "example.com:1": "other machines",
		"127.0.0.1:1": "every user of this machine", "unix://relative": "absolute path", "nonsense": "neither",
	} {
		err := server.Serve(t.Context(), server.Config{Dir: t.TempDir(), Listen: []string{address}})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", address, err, want)
		}
	}
}

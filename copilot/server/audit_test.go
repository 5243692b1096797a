package server_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/server"
)

// create makes KEKs before a broker runs.
func create(t testing.TB, dir string, keks map[string][]byte) {
	t.Helper()
	keys := open(t, dir)
	for id, key := range keks {
		if _, err := keys.Create(t.Context(), id, key); err != nil {
			t.Fatal(err)
		}
	}
	if err := keys.Close(); err != nil {
		t.Fatal(err)
	}
}

// audited returns the entries of the audit log.
func audited(t *testing.T, dir string) []audit.Entry {
	t.Helper()
	log, err := os.ReadFile(filepath.Join(dir, "audit.log"))
	if err != nil {
		t.Fatal(err)
	}
	var list []audit.Entry
	for line := range bytes.Lines(log) {
		var e audit.Entry
		if err := json.Unmarshal(line, &e); err != nil {
			t.Fatalf("audit log: %q: %v", line, err)
		}
		list = append(list, e)
	}
	return list
}

func lastAudited(t *testing.T, dir string) audit.Entry {
	t.Helper()
	list := audited(t, dir)
	if len(list) == 0 {
		t.Fatal("the audit log is empty")
	}
	return list[len(list)-1]
}

// TestRequestsThatNoPathTakesAreAudited sends requests that net/http would answer or
// redirect by itself, or that are for another listener.
func TestRequestsThatNoPathTakesAreAudited(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil, "x": nil, "key": nil})
	public := strings.TrimPrefix(serve(t, dir, server.Config{}), "unix://")
	admin := filepath.Join(dir, "admin.sock")
	for _, test := range []struct{ socket, method, target string }{
		{public, "GET", "//api/v1/key/x"},
		{public, "GET", "/api//v1/key/x"},
		{public, "GET", "/api/v1/key/x/"},
		{public, "GET", "/api/v1/key/./x"},
		{public, "GET", "/api/v2/keks/../key"},
		{public, "GET", "/api/v2/keks/x/../../../v1/key/x"},
		{public, "GET", "/healthz/"},
		{public, "CONNECT", "/api/v1/key/x"},
		{public, "OPTIONS", "*"},
		{public, "OPTIONS", "/api/v1/key/x"},
		{public, "POST", "/api/v1/key/x"},
		{public, "PUT", "/api/v2/keks/x/key"},
		{public, "DELETE", "/api/v2/keks/team-a"},
		{admin, "GET", "/api/v2/keks/"},
		{admin, "DELETE", "/api/v2/keks//team-a"},
		{admin, "DELETE", "/api/v2/./keks/team-a"},
		{admin, "DELETE", "/api/v2/keks"},
		{admin, "OPTIONS", "*"},
	} {
		name := test.method + " " + test.target
		before := len(audited(t, dir))
		resp, body := raw(t, test.socket, name)
		if resp.StatusCode/100 != 4 || resp.Header.Get("Location") != "" {
			t.Errorf("%s: %s, Location %q: %s", name, resp.Status, resp.Header.Get("Location"), body)
		}
		list := audited(t, dir)[before:]
		if len(list) != 1 {
			t.Errorf("%s: %d lines in the audit log, want 1", name, len(list))
			continue
		}
		e := list[0]
		if e.Verdict != "denied" || e.Status != resp.StatusCode || !strings.HasSuffix(e.Reason, name) || e.Request != resp.Header.Get("X-Request-Id") {
			t.Errorf("%s: audited %+v, answered %s as request %s", name, e, resp.Status, resp.Header.Get("X-Request-Id"))
		}
	}
	keys := open(t, dir)
	defer keys.Close()
	if list, err := keys.List(t.Context()); err != nil || len(list) != 3 {
		t.Errorf("%d KEKs are left, want 3: %v", len(list), err)
	}
}

// TestAuditKeyIsNotGivenOutUnnoticed gets the audit log's key on the admin socket.
func TestAuditKeyIsNotGivenOutUnnoticed(t *testing.T) {
	dir := t.TempDir()
	serve(t, dir, server.Config{})
	want, err := keystore.AuditKey(dir)
	if err != nil {
		t.Fatal(err)
	}
	if status, key := request(t, filepath.Join(dir, "admin.sock"), "GET", "/audit/key", ""); status != 200 || key != string(want) {
		t.Errorf("%d, %d bytes", status, len(key))
	}
	if e := lastAudited(t, dir); e.Action != "audit-key" || e.Verdict != audit.Allowed || e.Who != fmt.Sprintf("uid:%d", os.Getuid()) {
		t.Errorf("audited %+v", e)
	}
}

// raw sends a request with a path as it is.
func raw(t *testing.T, socket, methodAndTarget string) (*http.Response, string) {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "%s HTTP/1.1\r\nHost: broker\r\nConnection: close\r\n\r\n", methodAndTarget)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatalf("%s: %v", methodAndTarget, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s: %v", methodAndTarget, err)
	}
	return resp, string(body)
}

package server_test

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/copilot/server"
)

// TestIDsReachNoOtherKEK requests KEKs by ids that are written to reach another KEK or path.
func TestIDsReachNoOtherKEK(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil, "shared/x": nil, "secret": nil})
	policy := writeFile(t, filepath.Join(dir, "policy.toml"), "[[rule]]\nidentities = ['uid:*']\nkeks = ['team-a', 'shared/*']\nactions = ['export']\n")
	socket := strings.TrimPrefix(serve(t, dir, server.Config{Policy: policy}), "unix://")
	for id, want := range map[string]int{
		"team-a": 200, "%74eam-a": 200, "shared%2Fx": 200, "shared%2fx": 200,
		"shared/x": 404, "secret": 403, "team-a%00": 403, "team-a%20": 403, "team-a%0A": 403, "shared%2F..%2Fsecret": 403, "shared%2F%2E%2E%2Fsecret": 403,
		"..%2Fsecret": 403, "%2e%2e": 403, "shared%2Fx%2F": 403, "shared%2F": 404, "%252e%252e%252fsecret": 403, "TEAM-A": 403, "team-%C3%A4": 403,
		"team-a%FF": 403, "*": 403, "**": 403, "shared%2F*": 404, "%": 400, "a%zz": 400, ".": 404, "..": 404, strings.Repeat("a", 5000): 403,
	} {
		for _, path := range []string{"/api/v1/key/%s", "/api/v2/keks/%s/key"} {
			resp, body := raw(t, socket, "GET "+strings.Replace(path, "%s", id, 1))
			if resp.StatusCode != want {
				t.Errorf("%s: %d %s, want %d", fmt.Sprintf(path, id), resp.StatusCode, body, want)
			}
		}
	}
	// Ten megabytes of base64 are too much for a request line, and do no harm.
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET /api/v1/key/%s HTTP/1.1\r\nHost: broker\r\n\r\n", strings.Repeat("eyJr", 10<<20/4)) // it hangs up meanwhile
	if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err == nil && resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("an id of 10 MB: %s", resp.Status)
	}
	if resp, _ := raw(t, socket, "GET /api/v1/key/team-a"); resp.StatusCode != 200 {
		t.Errorf("after an id of 10 MB: %s", resp.Status)
	}
	for _, e := range audited(t, dir) {
		if len(e.KEK) > 600 || len(e.Reason) > 600 {
			t.Errorf("an entry of the audit log is too long: %d, %d", len(e.KEK), len(e.Reason))
		}
	}
	if info, err := os.Stat(filepath.Join(dir, "audit.log")); err != nil || info.Size() > 1<<20 {
		t.Errorf("the audit log grows: %v, %v", info.Size(), err)
	}
}

package server_test

import (
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// serveLoopback runs a broker without TLS and returns its HOST:PORT.
func serveLoopback(t *testing.T, dir string) string {
	t.Helper()
	address := loopbacktest.FreeAddress(t)
	serve(t, dir, server.Config{Listen: []string{address}, InsecureLoopback: true})
	return address
}

// TestLoopbackHost sends requests like a local browser whose page has given its own name
// the address 127.0.0.1.
func TestLoopbackHost(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": []byte("0123456789abcdef0123456789abcdef")})
	address := serveLoopback(t, dir)
	_, port, _ := net.SplitHostPort(address)
	for host, want := range map[string]int{
		address: 200, "localhost:" + port: 200, "localhost": 200, "127.0.0.1": 200, "[::1]:" + port: 200,
		"evil.example": 421, "evil.example:" + port: 421, "127.0.0.1.evil.example": 421, "localhost.evil.example:" + port: 421, "0.0.0.0:" + port: 421,
	} {
		for _, path := range []string{"/api/v1/key/team-a", "/api/v2/keks/team-a/key"} {
			req, err := http.NewRequest("GET", "http://"+address+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Host = host
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil {
				t.Fatal(err)
			}
			given := strings.Contains(string(body), "0123456789abcdef") || strings.Contains(string(body), "MDEyMzQ1")
			if resp.StatusCode != want || given != (want == 200) {
				t.Errorf("Host %s: %d for %s, want %d; was the key given: %t", host, resp.StatusCode, path, want, given)
			}
			e := lastAudited(t, dir)
			if e.Status != want || e.Who != "anonymous" || !strings.HasPrefix(e.From, "127.0.0.1:") {
				t.Errorf("Host %s: audited %+v", host, e)
			}
			if want == 421 && (e.Verdict != "denied" || !strings.Contains(e.Reason, host)) {
				t.Errorf("Host %s: audited as %s, %q", host, e.Verdict, e.Reason)
			}
		}
	}
	c, err := client.New(client.Config{URLs: []string{"http://" + address}, Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	if kek, err := c.KEK(t.Context(), "team-a", 0); err != nil || len(kek.Key) != 32 {
		t.Errorf("pilot's client: %d bytes, %v", len(kek.Key), err)
	}
}

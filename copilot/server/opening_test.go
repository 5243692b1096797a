package server_test

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot/server"
)

// TestServesWithoutDatabase serves with a database that is away, for longer than
// noteInterval.
func TestServesWithoutDatabase(t *testing.T) {
	dir := t.TempDir()
	conf := server.Config{Database: "postgres://127.0.0.1:1/copilot?connect_timeout=1"}
	url := serve(t, dir, conf)
	time.Sleep(1500 * time.Millisecond)
	if status, body := request(t, url, "GET", "/api/v2/keks", ""); status != http.StatusServiceUnavailable || !strings.Contains(body, "copilot is not ready") {
		t.Errorf("%d %s", status, body)
	}
	if status, body := request(t, dir+"/admin.sock", "GET", "/audit/heads", ""); status != http.StatusServiceUnavailable {
		t.Errorf("heads: %d %s", status, body)
	}
}

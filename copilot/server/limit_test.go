package server_test

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot/server"
)

// TestRateLimit sends more requests than the policy allows.
func TestRateLimit(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	url := serve(t, dir, server.Config{Policy: writeFile(t, filepath.Join(dir, "policy.toml"), `
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
	begin := time.Now()
	for range 50 {
		status, body := request(t, url, "GET", "/api/v2/keks/team-a/key", "")
		counts[status]++
		if status == 429 && !strings.Contains(body, "too many requests: try again in") {
			t.Error(body)
		}
	}
	// One more for each second that it took, and one line about the refused ones.
	seconds := int(time.Since(begin)/time.Second) + 2
	if counts[200] < 5 || counts[200] > 5+seconds || counts[429] == 0 || counts[200]+counts[429] != 50 {
		t.Errorf("answers in %d seconds: %v", seconds, counts)
	}
	if lines := len(audited(t, dir)) - before; lines > counts[200]+seconds+1 {
		t.Errorf("%d lines in the audit log in %d seconds", lines, seconds)
	}
	// The admin socket has no limits.
	for range 20 {
		if status, _ := request(t, "unix://"+filepath.Join(dir, "admin.sock"), "GET", "/api/v2/keks/team-a", ""); status != 200 {
			t.Errorf("admin: %d", status)
		}
	}
}

// TestVersionAtItsLimitIsRotated wraps more keys than a version may.
func TestVersionAtItsLimitIsRotated(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	serve(t, dir, server.Config{WrapLimit: 3000})
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
	info, err := keys.Get(t.Context(), "team-a")
	if err != nil || info.Version != 2 || info.Versions[0].Wraps < 3000 || info.Versions[1].Wraps != 1025 {
		t.Errorf("%+v, %v", info, err)
	}
}

package server_test

import (
	"io"
	"net/http"
	"strings"
	"testing"
)

// TestLoopbackWebPage sends requests like a local browser for a foreign page.
func TestLoopbackWebPage(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	address := serveLoopback(t, dir)
	for _, test := range []struct {
		origin, site string
		want         int
	}{
		{"", "", 200},
		{"", "none", 200},
		{"http://" + address, "same-origin", 200},
		{"https://evil.example", "", 403},
		{"https://evil.example", "cross-site", 403},
		{"null", "", 403},
		{"http://127.0.0.1:1", "same-site", 403},
		{"http://" + address + ".evil.example", "", 403},
		{"", "cross-site", 403}, // an image
		{"", "same-site", 403},
	} {
		for _, call := range []string{"GET /api/v1/key/team-a", "GET /api/v2/keks/team-a/key", "GET /api/v2/keks", "POST /api/v2/keks/team-a/wrap"} {
			method, path, _ := strings.Cut(call, " ")
			body := ""
			if method == "POST" {
				body = `{"plaintext":"AAAA"}`
			}
			req, err := http.NewRequest(method, "http://"+address+path, strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			if test.origin != "" {
				req.Header.Set("Origin", test.origin)
			}
			if test.site != "" {
				req.Header.Set("Sec-Fetch-Site", test.site)
			}
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			answer, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if resp.StatusCode != test.want || test.want == 403 && !strings.Contains(string(answer), "a web page made the request") {
				t.Errorf("%s, Origin %q, Sec-Fetch-Site %q: %d %s, want %d", call, test.origin, test.site, resp.StatusCode, answer, test.want)
			}
		}
	}
}

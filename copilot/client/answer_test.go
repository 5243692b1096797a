package client

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

// reply answers with JSON, as copilot does.
func reply(w http.ResponseWriter, text string) {
	w.Header().Set("Content-Type", "application/json")
	fmt.Fprint(w, text)
}

// problemText is a problem document of copilot's.
func problemText(code int, detail string) string {
	b, err := json.Marshal(problem{"about:blank", http.StatusText(code), code, detail, "0123456789abcdef"})
	if err != nil {
		panic(err)
	}
	return string(b)
}

// refuse answers with a problem document, as copilot does.
func refuse(w http.ResponseWriter, code int, detail string) {
	w.Header().Set("Content-Type", "application/problem+json; charset=utf-8")
	w.WriteHeader(code)
	fmt.Fprint(w, problemText(code, detail))
}

// TestStranger has something else answer in a broker's place, with each status
// that copilot says no with. It is not believed, the next broker is asked, and
// after that the stranger again.
func TestStranger(t *testing.T) {
	t.Parallel()
	kinds := map[string]struct{ kind, body string }{
		"nothing":               {"", ""},
		"page":                  {"text/html", "<html>SECRET"},
		"text":                  {"text/plain; charset=utf-8", "default backend - 404 SECRET"},
		"JSON":                  {"application/json", `{"message":"SECRET"}`},
		"another's problem":     {"application/problem+json", `{"type":"about:blank","title":"Not Found","status":CODE,"detail":"SECRET","instance":"/api/v2/keks/a/key"}`},
		"a problem of no type":  {"application/json", problemText(404, "SECRET")},
		"of another status":     {"application/problem+json", problemText(418, "SECRET")},
		"a request without id":  {"application/problem+json", `{"status":CODE,"request":"SECRET"}`},
		"a problem that is cut": {"application/problem+json", problemText(404, "SECRET")[:60]},
	}
	for name, k := range kinds {
		for _, code := range []int{200, 201, 301, 307, 400, 401, 403, 404, 405, 407, 409, 410, 413, 421, 422, 426, 451, 500, 501, 511} {
			answer := func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", k.kind)
				w.Header().Set("Location", "https://login.example.com/?SECRET")
				w.WriteHeader(code)
				fmt.Fprint(w, strings.ReplaceAll(k.body, "CODE", fmt.Sprint(code)))
			}
			bad, other := startAsked(t, answer), startAsked(t, good)
			c := newClient(t, time.Minute, bad.url, other.url)
			if _, err := c.KEK(t.Context(), "a", 0); err != nil || other.calls.Load() != 1 {
				t.Errorf("%d with %s: the other broker is not asked: %v", code, name, err)
			}
			alone := newClient(t, time.Minute, bad.url)
			alone.rounds = 1
			_, err := alone.KEK(t.Context(), "a", 0)
			if !errors.Is(err, ErrUnavailable) || errors.Is(err, ErrNotFound) || errors.Is(err, ErrForbidden) || errors.Is(err, ErrNotExported) || errors.Is(err, ErrRejected) || strings.Contains(err.Error(), "SECRET") {
				t.Errorf("%d with %s: %v", code, name, err)
			}
		}
	}
}

// TestOriginalStranger does so where the original's API is expected, whose bare
// 404 is the only no.
func TestOriginalStranger(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		code       int
		kind, body string
		is         error
	}{
		{404, "", "", ErrNotFound},
		{404, "text/plain", "default backend - 404", ErrUnavailable},
		{404, "application/json", `{"timestamp":1,"status":404,"error":"Not Found","path":"/api/v1/key/a"}`, ErrUnavailable},
		{403, "", "", ErrUnavailable},
		{400, "text/html", "<html>", ErrUnavailable},
		{200, "text/html", "<h1>Welcome</h1>", ErrUnavailable}, // 16 bytes, as a key
		{200, "application/json", `{"status":"UP","groups":["live"]}`[:32], ErrUnavailable},
		{404, "application/problem+json", problemText(404, "no such KEK"), ErrNotFound},
		{403, "application/problem+json", problemText(403, "not you"), ErrForbidden},
		{200, "application/octet-stream", strings.Repeat("k", 32), nil},
	} {
		b := startAsked(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", test.kind)
			w.WriteHeader(test.code)
			fmt.Fprint(w, test.body)
		})
		c := newClient(t, time.Minute, b.url+originalPath)
		c.rounds = 1
		if _, err := c.KEK(t.Context(), "a", 0); !errors.Is(err, test.is) {
			t.Errorf("%d %s %s: %v", test.code, test.kind, test.body, err)
		}
	}
}

func TestPrintable(t *testing.T) {
	if got, want := printable("a\x1b[2J\u009b2J\u202eb\xff\nc é"), "a [2J 2J b  c é"; got != want {
		t.Errorf("%q, not %q", got, want)
	}
}

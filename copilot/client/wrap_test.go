package client

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/internal/wireformat"
)

// TestWrapAnswers has brokers answer badly to who wants a layer key wrapped or
// unwrapped.
func TestWrapAnswers(t *testing.T) {
	long := base64.StdEncoding.EncodeToString(make([]byte, wireformat.MaxWrappedKey))
	longer := base64.StdEncoding.EncodeToString(make([]byte, wireformat.MaxWrappedKey+1))
	for _, test := range []struct {
		name, verb string
		code       int
		body       string
		is         error // nil: it is fine
	}{
		{"good", "wrap", 200, `{"id":"a","version":2,"wrappedKey":"AAAA"}`, nil},
		{"long", "wrap", 200, `{"id":"a","version":2,"wrappedKey":"` + long + `"}`, nil},
		{"too long", "wrap", 200, `{"id":"a","version":2,"wrappedKey":"` + longer + `"}`, ErrUnavailable},
		{"no version", "wrap", 200, `{"id":"a","wrappedKey":"AAAA"}`, ErrUnavailable},
		{"no key", "wrap", 200, `{"id":"a","version":2}`, ErrUnavailable},
		{"web page", "wrap", 200, `<html>SECRET`, ErrUnavailable},
		{"not allowed", "wrap", 403, problemText(403, "no"), ErrForbidden},
		{"conflict", "wrap", 409, problemText(409, "SECRET no"), ErrRejected},
		{"too large", "wrap", 413, problemText(413, "no"), ErrRejected},
		{"fails", "wrap", 500, ``, ErrUnavailable},
		{"good", "unwrap", 200, `{"plaintext":"AAAA"}`, nil},
		{"nothing", "unwrap", 200, `{}`, ErrUnavailable},
		{"no base64", "unwrap", 200, `{"plaintext":"SECRET!"}`, ErrUnavailable},
		{"changed", "unwrap", 400, problemText(400, "this KEK did not wrap that key"), ErrRejected},
		{"no such version", "unwrap", 404, problemText(404, "no such KEK"), ErrNotFound},
		{"not exported", "key", 409, strings.Replace(problemText(409, "it stays in the HSM"), "about:blank", wireformat.ProblemNotExported, 1), ErrNotExported},
		{"not exported, by another status", "key", 500, strings.Replace(problemText(500, "no"), "about:blank", wireformat.ProblemNotExported, 1), ErrUnavailable},
		{"conflict", "key", 409, strings.Replace(problemText(409, "no"), "about:blank", "urn:pilot:problem:other", 1), ErrRejected},
		{"wrong path", "key", 404, strings.Replace(problemText(404, "no"), "about:blank", wireformat.ProblemNoSuchPath, 1), ErrUnavailable},
		{"good", "use", 200, `{"id":"a","workload":"prod/web"}`, nil},
		{"another KEK", "use", 200, `{"id":"b","workload":"prod/web"}`, ErrUnavailable},
		{"another workload", "use", 200, `{"id":"a","workload":"dev/web"}`, ErrUnavailable},
		{"nothing", "use", 200, `{}`, ErrUnavailable},
		{"web page", "use", 200, `<html>SECRET`, ErrUnavailable},
		{"not allowed", "use", 403, problemText(403, "no"), ErrForbidden},
		{"proxy", "use", 403, "no", ErrUnavailable},
		{"earlier broker", "use", 404, strings.Replace(problemText(404, "no"), "about:blank", wireformat.ProblemNoSuchPath, 1), ErrUnavailable},
		{"earlier broker", "coco", 400, problemText(400, "the body is not the JSON that this path takes"), ErrRejected},
		{"another method", "coco", 200, `{"id":"a","version":2,"method":"A256GCMKW","iv":"AAAAAAAAAAAAAAAA","wrappedKey":"AAAA"}`, ErrUnavailable},
		{"another KEK", "wrap", 200, `{"id":"b","version":2,"wrappedKey":"AAAA"}`, ErrUnavailable},
	} {
		b := startAsked(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			if test.code != 200 {
				w.Header().Set("Content-Type", "application/problem+json")
			}
			w.WriteHeader(test.code)
			fmt.Fprint(w, test.body)
		})
		c := newClient(t, time.Minute, b.url)
		var err error
		switch test.verb {
		case "wrap":
			_, err = c.Wrap(t.Context(), "a", []byte("PLAIN"))
		case "coco":
			if _, err = c.WrapCoCo(t.Context(), "a", []byte("PLAIN")); test.name == "earlier broker" && !strings.Contains(err.Error(), "is it upgraded?") {
				t.Error(err)
			}
		case "unwrap":
			_, err = c.Unwrap(t.Context(), "a", Wrapped{Version: 2, Method: "copilot", Key: []byte("x")})
		case "key":
			_, err = c.KEK(t.Context(), "a", 0)
		case "use":
			if _, err = c.Use(t.Context(), "a", 1, "prod/web", nil); test.name == "earlier broker" && !strings.Contains(err.Error(), "upgrade copilot") {
				t.Error(err)
			}
		}
		if !errors.Is(err, test.is) || err != nil && (!strings.Contains(err.Error(), b.url) || strings.Contains(err.Error(), "PLAIN") || test.code == 200 && strings.Contains(err.Error(), "SECRET")) {
			t.Errorf("%s %s: %v, want %v", test.verb, test.name, err, test.is)
		}
		for _, other := range []error{ErrNotFound, ErrForbidden, ErrNotExported, ErrRejected, ErrUnavailable} {
			if other != test.is && errors.Is(err, other) {
				t.Errorf("%s %s: %v is %q too", test.verb, test.name, err, other)
			}
		}
	}
}

// TestWrapRequests checks what a broker is asked.
func TestWrapRequests(t *testing.T) {
	var asked []string
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		asked = append(asked, fmt.Sprintf("%s %s %s %s", r.Method, r.URL.EscapedPath(), r.Header.Get("Content-Type"), body))
		id, _ := url.PathUnescape(strings.Split(r.URL.EscapedPath(), "/")[4])
		reply(w, fmt.Sprintf(`{"id":%q,"version":2,"wrappedKey":"AAAA","plaintext":"AAAA"}`, id))
	}))
	defer s.Close()
	c := newClient(t, time.Minute, s.URL)
	if _, err := c.Wrap(t.Context(), "a/b", []byte("key")); err != nil {
		t.Error(err)
	}
	if _, err := c.Unwrap(t.Context(), "a", Wrapped{Version: 2, Method: "copilot", Key: []byte("key")}); err != nil {
		t.Error(err)
	}
	if _, err := c.Unwrap(t.Context(), "a", Wrapped{Version: 3, Method: "A256GCMKW", IV: make([]byte, 12), Key: []byte("key")}); err != nil {
		t.Error(err)
	}
	for i, want := range []string{
		`POST /api/v2/keks/a%2Fb/wrap application/json {"plaintext":"a2V5"}`,
		`POST /api/v2/keks/a/unwrap application/json {"version":2,"method":"copilot","wrappedKey":"a2V5"}`,
		`POST /api/v2/keks/a/unwrap application/json {"version":3,"method":"A256GCMKW","iv":"AAAAAAAAAAAAAAAA","wrappedKey":"a2V5"}`,
	} {
		if i >= len(asked) || asked[i] != want {
			t.Errorf("asked %q, want %s", asked, want)
		}
	}
}

// TestWrapNotRead has a broker answer, or hang up, before it has read what it
// is sent, which is cleared by then.
func TestWrapNotRead(t *testing.T) {
	for name, serve := range map[string]http.HandlerFunc{
		"unavailable": status(503),
		"hangs up":    func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
		"is late":     func(http.ResponseWriter, *http.Request) { time.Sleep(400 * time.Millisecond) },
		"reads slowly": func(_ http.ResponseWriter, r *http.Request) {
			for b := make([]byte, 1000); ; time.Sleep(time.Millisecond) {
				if _, err := r.Body.Read(b); err != nil {
					return
				}
			}
		},
	} {
		b := startAsked(t, serve)
		c := newClient(t, 200*time.Millisecond, b.url)
		if _, err := c.Wrap(t.Context(), "a", make([]byte, 64<<10)); !errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A copilot from before there were labels takes no request with them.
func TestEarlierBrokerIsAskedWithoutLabels(t *testing.T) {
	b := startAsked(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		body, err := io.ReadAll(r.Body)
		if err != nil || strings.Contains(string(body), "labels") {
			w.Header().Set("Content-Type", "application/problem+json")
			w.WriteHeader(400)
			fmt.Fprint(w, problemText(400, "the body is not the JSON that this path takes"))
			return
		}
		fmt.Fprint(w, `{"id":"a","workload":"prod/web"}`)
	})
	keys, err := newClient(t, time.Minute, b.url).Use(t.Context(), "a", 1, "prod/web", map[string]string{"tier": "gold"})
	if err != nil || len(keys) != 0 {
		t.Errorf("%q, %v", keys, err)
	}
}

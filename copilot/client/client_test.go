package client

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

const goodAnswer = `{"id":"a","version":1,"key":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`

// TestHostileBroker asks brokers that answer badly or not at all.
func TestHostileBroker(t *testing.T) {
	for _, test := range []struct {
		name  string
		serve func(try int32, w http.ResponseWriter)
		tries int32 // 0: several
		is    error
		want  string
	}{
		{"good", func(_ int32, w http.ResponseWriter) { reply(w, goodAnswer) }, 1, nil, ""},
		{"unavailable at first", func(try int32, w http.ResponseWriter) {
			if try < 3 {
				w.WriteHeader(503)
				return
			}
			reply(w, goodAnswer)
		}, 3, nil, ""},
		{"unavailable", func(_ int32, w http.ResponseWriter) { w.WriteHeader(503) }, 0, ErrUnavailable, "503"},
		{"come back in an hour", func(_ int32, w http.ResponseWriter) { w.Header().Set("Retry-After", "3600"); w.WriteHeader(429) }, 1, ErrUnavailable, "429"},
		{"not found", func(_ int32, w http.ResponseWriter) { refuse(w, 404, "no such KEK") }, 1, ErrNotFound, "copilot keys create"},
		{"forbidden", func(_ int32, w http.ResponseWriter) {
			refuse(w, 403, "not you\n\x1b[31m")
		}, 1, ErrForbidden, "not you"},
		{"its fault", func(_ int32, w http.ResponseWriter) { refuse(w, 500, "no") }, 1, ErrUnavailable, "500"},
		{"redirect", func(_ int32, w http.ResponseWriter) { w.Header().Set("Location", "http://evil"); w.WriteHeader(302) }, 0, ErrUnavailable, "302"},
		{"web page", func(_ int32, w http.ResponseWriter) { fmt.Fprint(w, "<html>SECRET") }, 0, ErrUnavailable, "text/html"},
		{"other JSON", func(_ int32, w http.ResponseWriter) { reply(w, `["SECRET"]`) }, 0, ErrUnavailable, "is something else at that address"},
		{"huge", func(_ int32, w http.ResponseWriter) { reply(w, strings.Repeat("x", maxAnswer+1)) }, 0, ErrUnavailable, "more than 131072 bytes"},
		{"another KEK", func(_ int32, w http.ResponseWriter) { reply(w, strings.Replace(goodAnswer, `"a"`, `"b"`, 1)) }, 0, ErrUnavailable, `KEK "b"`},
		{"no version", func(_ int32, w http.ResponseWriter) { reply(w, strings.Replace(goodAnswer, `1`, `0`, 1)) }, 0, ErrUnavailable, "version 0"},
		{"short key", func(_ int32, w http.ResponseWriter) { reply(w, `{"id":"a","version":1,"key":"U0VDUkVU"}`) }, 0, ErrUnavailable, "6 bytes"},
		{"cut", func(_ int32, w http.ResponseWriter) { w.Header().Set("Content-Length", "900"); fmt.Fprint(w, "{") }, 0, ErrUnavailable, "was cut short"},
		{"silent", nil, 0, ErrUnavailable, "no response within "},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var tries atomic.Int32
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				n := tries.Add(1)
				if test.serve == nil {
					<-r.Context().Done()
					return
				}
				test.serve(n, w)
			}))
			defer s.Close()
			const timeout = 20 * time.Second
			c, err := New(Config{URLs: []string{s.URL}, Timeout: timeout})
			if err != nil {
				t.Fatal(err)
			}
			if test.serve == nil {
				c.try = 400 * time.Millisecond
			}
			start := time.Now()
			_, err = c.KEK(t.Context(), "a", 0)
			if took := time.Since(start); took > 2*timeout {
				t.Errorf("it took %s", took)
			}
			if test.want == "" && test.is == nil && err != nil || test.is != nil && !errors.Is(err, test.is) ||
				test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), `KEK "a": copilot at http://127.0.0.1`)) {
				t.Errorf("got %v", err)
			}
			if err != nil && (strings.Contains(err.Error(), "SECRET") || strings.ContainsAny(err.Error(), "\n\x1b")) {
				t.Errorf("the error repeats too much: %q", err)
			}
			if got := tries.Load(); test.tries != 0 && got != test.tries || test.tries == 0 && got < 2 {
				t.Errorf("%d tries, want %d", got, test.tries)
			}
		})
	}
}

// TestOriginalBroker asks one that speaks the original's API.
func TestOriginalBroker(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.EscapedPath() {
		case "/api/v1/key/a%2Fb+=":
			w.Header().Set("Content-Type", "application/octet-stream")
			fmt.Fprint(w, strings.Repeat("k", 24))
		case "/api/v1/key/short":
			w.Header().Set("Content-Type", "application/octet-stream")
			fmt.Fprint(w, "SECRET")
		default:
			w.WriteHeader(404)
		}
	}))
	defer s.Close()
	c, err := New(Config{URLs: []string{s.URL + "/api/v1/key"}})
	if err != nil {
		t.Fatal(err)
	}
	if kek, err := c.KEK(t.Context(), "a/b+=", 7); err != nil || len(kek.Key) != 24 || kek.Version != 0 {
		t.Errorf("got %d bytes of version %d, %v", len(kek.Key), kek.Version, err)
	}
	if _, err := c.KEK(t.Context(), "short", 0); err == nil || strings.Contains(err.Error(), "SECRET") {
		t.Errorf("a short key: %v", err)
	}
	if _, err := c.KEK(t.Context(), "nobody", 0); !errors.Is(err, ErrNotFound) {
		t.Errorf("no key: %v", err)
	}
	if _, err := c.Wrap(t.Context(), "a", nil); err == nil {
		t.Error("it wraps")
	}
}

func TestRefusedConfig(t *testing.T) {
	for _, test := range []struct {
		conf Config
		want string
	}{
		{Config{URLs: []string{""}}, "neither"},
		{Config{URLs: []string{"ftp://x"}}, "neither"},
		{Config{URLs: []string{"http://192.0.2.1:80"}}, "unencrypted"},
		{Config{URLs: []string{"http://copilot.example.com"}}, "unencrypted"},
		{Config{URLs: []string{"unix://relative"}}, "absolute path"},
		{Config{URLs: []string{"https://user:SECRET@x"}}, "has no user"},
		{Config{URLs: []string{"https://x"}, CAFile: "/nonexistent"}, "CA: "},
		{Config{URLs: []string{"https://x"}, CAFile: "/dev/null"}, "holds no certificate"},
		{Config{URLs: []string{"https://x"}, CertFile: "x"}, "must be set together"},
		{Config{URLs: []string{"unix:///x"}, CAFile: "x"}, "certificates are for https"},
		{Config{URLs: []string{"https://"}}, "has no host"},
		{Config{}, "no broker is configured"},
		{Config{URLs: []string{"https://a", "https://b", "https://a"}}, "named twice"},
		{Config{URLs: []string{"https://a", "ftp://b"}}, "neither"},
		{Config{URLs: []string{"https://a", "https://b/api/v1/key"}}, "different APIs"},
	} {
		if _, err := New(test.conf); err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%+v: %v, want %q", test.conf, err, test.want)
		}
	}
}

func TestNobodyThere(t *testing.T) {
	for _, url := range []string{"unix:///nonexistent/socket", "http://127.0.0.1:1"} {
		c, err := New(Config{URLs: []string{url}, Timeout: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.KEK(t.Context(), "a", 0)
		if advice := "start copilot on this machine"; !errors.Is(err, ErrUnavailable) || strings.Contains(err.Error(), advice) != strings.HasPrefix(url, "unix:") {
			t.Errorf("%s: %v", url, err)
		}
	}
}

// FuzzAnswers has the broker answer anything.
func FuzzAnswers(f *testing.F) {
	f.Add(200, goodAnswer)
	f.Add(404, problemText(404, "no such KEK"))
	f.Add(200, `{"version":1,"method":"A256GCMKW","iv":"AAAAAAAAAAAAAAAA","wrappedKey":"AAAA"}`)
	f.Add(200, `{"plaintext":"AAAA"}`)
	f.Add(403, `{"title":"no","detail":"not you\n"}`)
	f.Add(503, "")
	var status int
	var answer string
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if status != 200 {
			w.Header().Set("Content-Type", "application/problem+json")
		}
		w.WriteHeader(status)
		fmt.Fprint(w, answer)
	}))
	defer s.Close()
	c, err := New(Config{URLs: []string{s.URL}, Timeout: time.Millisecond})
	if err != nil {
		f.Fatal(err)
	}
	c.timeout, c.try, c.rounds = time.Minute, time.Minute, 1
	f.Fuzz(func(t *testing.T, code int, text string) {
		if code < 200 || code > 599 || code == 204 || code == 304 {
			return // which have no body
		}
		status, answer = code, text
		check := func(err error) {
			t.Helper()
			if err != nil && strings.ContainsAny(err.Error(), "\n\r\x1b\x00") {
				t.Errorf("the error is not fit for a terminal: %q", err)
			}
		}
		kek, err := c.KEK(t.Context(), "a", 0)
		check(err)
		if err == nil && (kek.ID != "a" || kek.Version < 1 || len(kek.Key) != 16 && len(kek.Key) != 24 && len(kek.Key) != 32) {
			t.Errorf("%d %q is taken for the KEK %+v", code, text, kek)
		}
		w, err := c.Wrap(t.Context(), "a", []byte("secret"))
		check(err)
		if err == nil && (w.Version < 1 || len(w.Key) == 0) {
			t.Errorf("%d %q is taken for the wrapped key %+v", code, text, w)
		}
		plaintext, err := c.Unwrap(t.Context(), "a", Wrapped{Version: 1, Method: "copilot", Key: []byte("x")})
		check(err)
		if err == nil && len(plaintext) == 0 {
			t.Errorf("%d %q is taken for a layer key", code, text)
		}
	})
}

package client

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// idToken returns a token that is valid for some time, with a number in it.
func idToken(valid time.Duration, n int32) string {
	payload := fmt.Sprintf(`{"iat":%d,"exp":%d,"n":%d}`, time.Now().Unix(), time.Now().Add(valid).Unix(), n)
	return "e30." + base64.RawURLEncoding.EncodeToString([]byte(payload)) + ".SECRET"
}

// gitHub has a server answer in GitHub's place, and returns the token of a job for the
// audience copilot & co.
func gitHub(t *testing.T, answer http.HandlerFunc) *gitHubToken {
	t.Helper()
	s := httptest.NewTLSServer(answer)
	t.Cleanup(s.Close)
	t.Setenv(gitHubURL, s.URL+"/token?api-version=2.0")
	t.Setenv(gitHubBearer, "SECRET of the job")
	token, err := newGitHubToken("copilot & co")
	if err != nil {
		t.Fatal(err)
	}
	token.http.Transport = s.Client().Transport
	return token
}

func TestGitHubTokenIsFetchedOnceForManyRequests(t *testing.T) {
	var asked atomic.Int32
	token := gitHub(t, func(w http.ResponseWriter, r *http.Request) {
		n := asked.Add(1)
		if q := r.URL.Query(); r.Header.Get("Authorization") != "bearer SECRET of the job" || q.Get("audience") != "copilot & co" || q.Get("api-version") != "2.0" {
			t.Errorf("%s %s", r.URL, r.Header)
		}
		fmt.Fprintf(w, `{"count":1,"value":%q}`, idToken(time.Hour, n))
	})
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if got, err := token.authorization(t.Context()); err != nil || !strings.HasPrefix(got, "Bearer e30.") {
				t.Errorf("%.10s %v", got, err)
			}
		})
	}
	wg.Wait()
	if n := asked.Load(); n != 1 {
		t.Errorf("GitHub was asked %d times", n)
	}
}

// TestGitHubTokenIsReplacedAtHalfOfItsTime has a clock of its own.
func TestGitHubTokenIsReplacedAtHalfOfItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked int32
		token := &gitHubToken{url: "https://github.example.com/?a=b", turn: make(chan struct{}, 1), http: &http.Client{Transport: roundTripper(func(r *http.Request) *http.Response {
			asked++
			w := httptest.NewRecorder()
			fmt.Fprintf(w, `{"value":%q}`, idToken(5*time.Minute, asked))
			return w.Result()
		})}}
		token.turn <- struct{}{}
		for _, step := range []struct {
			wait time.Duration
			want int32
		}{{0, 1}, {149 * time.Second, 1}, {2 * time.Second, 2}, {149 * time.Second, 2}, {time.Hour, 3}} {
			time.Sleep(step.wait)
			if _, err := token.authorization(t.Context()); err != nil || asked != step.want {
				t.Errorf("asked %d times, want %d: %v", asked, step.want, err)
			}
		}
	})
}

func TestTokenThatDoesNotSayHowLongItIsValidIsNotKept(t *testing.T) {
	for payload, want := range map[string]time.Duration{
		`{"iat":1800000000,"exp":1800000300}`:   5 * time.Minute,
		`{"iat":1800000000,"exp":9e300}`:        24 * time.Hour,
		`{"exp":1800000300}`:                    0,
		`{"iat":1800000000}`:                    0,
		`{"iat":1800000300,"exp":1800000000}`:   0,
		`{"iat":"1800000000","exp":1800000300}`: 0,
		`[]`:                                    0,
	} {
		if got := lifetime("e30." + base64.RawURLEncoding.EncodeToString([]byte(payload)) + ".x"); got != want {
			t.Errorf("%s: %s, want %s", payload, got, want)
		}
	}
}

type roundTripper func(*http.Request) *http.Response

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r), nil }

func TestGitHubThatAnswersNonsenseIsAnError(t *testing.T) {
	elsewhere := startAsked(t, good)
	for name, test := range map[string]struct {
		answer http.HandlerFunc
		want   string
		tries  int32
	}{
		"forbidden":    {status(403), "permissions: id-token: write", 1},
		"unauthorized": {status(401), "permissions: id-token: write", 1},
		"not found":    {status(404), "404", 1},
		"down":         {status(500), "500", maxTries},
		"too often":    {status(429), "429", maxTries},
		"redirects": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.url, http.StatusTemporaryRedirect)
		}, "307", 1},
		"not JSON":    {text("<html>SECRET"), "did not answer in JSON", 1},
		"no value":    {text("{}"), "is empty", 1},
		"two lines":   {text(`{"value":"SECRET\nX: SECRET"}`), "something other than a token", 1},
		"large":       {text(`{"value":"` + strings.Repeat("S", maxToken+1) + `"}`), "more than 65536 bytes", 1},
		"very large":  {text(`{"value":"` + strings.Repeat("S", 3*maxToken) + `"}`), "did not answer in JSON", 1},
		"breaks off":  {func(w http.ResponseWriter, r *http.Request) { w.Header().Set("Content-Length", "100") }, "breaks off", maxTries},
		"hangs up":    {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "get an ID token from GitHub at 127.0.0.1", maxTries},
		"as a number": {text(`{"value":1}`), "did not answer in JSON", 1},
	} {
		t.Run(name, func(t *testing.T) {
			var asked atomic.Int32
			token := gitHub(t, func(w http.ResponseWriter, r *http.Request) {
				asked.Add(1)
				test.answer(w, r)
			})
			_, err := token.authorization(t.Context())
			if err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "SECRET") || strings.Contains(err.Error(), "audience") {
				t.Errorf("%v", err)
			}
			if n := asked.Load(); n != test.tries {
				t.Errorf("%d tries, want %d", n, test.tries)
			}
		})
	}
	if n := elsewhere.calls.Load(); n != 0 {
		t.Error("the redirect was followed, with the job's token")
	}
}

func text(body string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, body) }
}

// TestGitHubThatHangsEndsWithTheCall has callers wait for GitHub's answer, each for as long
// as it likes.
func TestGitHubThatHangsEndsWithTheCall(t *testing.T) {
	release := make(chan struct{})
	token := gitHub(t, func(http.ResponseWriter, *http.Request) { <-release })
	t.Cleanup(func() { close(release) })
	first, cancelFirst := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := token.authorization(first)
		done <- err
	}()
	second, cancelSecond := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancelSecond()
	if _, err := token.authorization(second); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	cancelFirst()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestGitHubTokenNeedsItsVariables(t *testing.T) {
	for _, test := range []struct{ url, bearer, want string }{
		{"", "SECRET", "ACTIONS_ID_TOKEN_REQUEST_URL is not set: give the job"},
		{"https://github.example.com", "", "ACTIONS_ID_TOKEN_REQUEST_TOKEN is not set"},
		{"http://github.example.com", "SECRET", "is not an https URL"},
		{"https://", "SECRET", "is not an https URL"},
		{"://", "SECRET", "is not an https URL"},
	} {
		t.Setenv(gitHubURL, test.url)
		t.Setenv(gitHubBearer, test.bearer)
		_, err := New(Config{URLs: []string{"https://copilot.example.com"}, GitHubAudience: "copilot"})
		if !errors.Is(err, ErrNoIDToken) || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%q: %v", test.url, err)
		}
	}
	t.Setenv(gitHubURL, "https://github.example.com")
	t.Setenv(gitHubBearer, "SECRET")
	t.Setenv("TOKEN_OF_A_JOB", "SECRET SECRET")
	for _, conf := range []Config{{GitHubAudience: "copilot"}, {TokenVariable: "TOKEN_OF_A_JOB"}} {
		conf.URLs = []string{"http://127.0.0.1:1"}
		if _, err := New(conf); err == nil || !strings.Contains(err.Error(), "unencrypted") {
			t.Errorf("%+v: %v", conf, err)
		}
	}
	if _, err := New(Config{URLs: []string{"https://copilot.example.com"}, TokenVariable: "TOKEN_OF_A_JOB"}); err == nil || !strings.Contains(err.Error(), "TOKEN_OF_A_JOB") || strings.Contains(err.Error(), "SECRET") {
		t.Error(err)
	}
}

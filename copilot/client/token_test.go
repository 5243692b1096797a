package client

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// startSocket answers on a unix socket and notes the Authorization header.
func startSocket(t *testing.T) (url string, shown *atomic.Value) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	shown = new(atomic.Value)
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		shown.Store(r.Header.Get("Authorization"))
		if r.Header.Get("Authorization") == "Bearer SECRET.old" {
			w.WriteHeader(401)
			return
		}
		good(w, r)
	})}}
	s.Start()
	t.Cleanup(s.Close)
	return "unix://" + socket, shown
}

// writeToken replaces the file as the kubelet does: the name is that of a link.
func writeToken(t *testing.T, name, token string, at time.Time) {
	t.Helper()
	file := fmt.Sprintf("%s.%d", name, at.UnixNano())
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(file, at, at); err != nil {
		t.Fatal(err)
	}
	os.Remove(name + ".new")
	if err := os.Symlink(file, name+".new"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		t.Fatal(err)
	}
}

func TestToken(t *testing.T) {
	url, shown := startSocket(t)
	file := filepath.Join(t.TempDir(), "token")
	now := time.Now().Add(-time.Hour)
	writeToken(t, file, "SECRET.1\n", now)
	c, err := New(Config{URLs: []string{url}, TokenFile: file})
	if err != nil {
		t.Fatal(err)
	}
	expect := func(token string, is error) {
		t.Helper()
		shown.Store("")
		_, err := c.KEK(t.Context(), "a", 0)
		if !errors.Is(err, is) || err != nil && strings.Contains(err.Error(), "SECRET") {
			t.Errorf("got %v, want %v", err, is)
		}
		if got := shown.Load(); got != token {
			t.Errorf("shown is %q, want %q", got, token)
		}
	}
	expect("Bearer SECRET.1", nil)
	writeToken(t, file, "SECRET.2", now.Add(time.Minute))
	expect("Bearer SECRET.2", nil)
	writeToken(t, file, "SECRET.old", now) // older than the one before
	expect("Bearer SECRET.old", ErrUnavailable)

	// What can't be used is not sent, nor is the one before.
	for i, bad := range []string{"", " \n", "SECRET SECRET", "SECRET\nSECRET: x", strings.Repeat("x", maxToken+1)} {
		writeToken(t, file, bad, now.Add(time.Duration(i+2)*time.Minute))
		shown.Store("none")
		if _, err := c.KEK(t.Context(), "a", 0); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "broker-token-file: "+file) || strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%.20q: %v", bad, err)
		}
		if got := shown.Load(); got != "none" {
			t.Errorf("%.20q: it is sent", bad)
		}
		if _, err := New(Config{URLs: []string{url}, TokenFile: file}); err == nil {
			t.Errorf("%.20q: it is taken at start", bad)
		}
	}
	os.Remove(file)
	if _, err := c.KEK(t.Context(), "a", 0); !errors.Is(err, os.ErrNotExist) || !errors.Is(err, ErrUnavailable) {
		t.Errorf("without a file: %v", err)
	}
	if _, err := New(Config{URLs: []string{url}, TokenFile: file}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a file: %v", err)
	}
	if _, err := New(Config{URLs: []string{url}, TokenFile: "/run/pilot-test/nothere"}); err != nil {
		t.Errorf("without a file that a reboot removes: %v", err)
	}
	writeToken(t, file, "SECRET.3", now.Add(time.Hour))
	expect("Bearer SECRET.3", nil)
}

// TestTokenStays checks that a broker which redirects does not get the token to
// go elsewhere.
func TestTokenStays(t *testing.T) {
	elsewhere := startAsked(t, good)
	broker := httptest.NewTLSServer(http.RedirectHandler(elsewhere.url, http.StatusTemporaryRedirect))
	defer broker.Close()
	file := filepath.Join(t.TempDir(), "token")
	writeToken(t, file, "SECRET", time.Now())
	c, err := New(Config{URLs: []string{broker.URL}, TokenFile: file, Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	c.brokers[0].http.Transport = broker.Client().Transport
	if _, err := c.KEK(t.Context(), "a", 0); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "307") {
		t.Errorf("got %v", err)
	}
	if n := elsewhere.calls.Load(); n != 0 {
		t.Error("the redirect was followed")
	}
}

func TestTokenInPlain(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	writeToken(t, file, "SECRET", time.Now())
	for _, urls := range [][]string{{"http://127.0.0.1:1"}, {"HTTP://127.0.0.1:1"}, {"https://copilot.example.com", "http://localhost:1"}} {
		if _, err := New(Config{URLs: urls, TokenFile: file}); err == nil || !strings.Contains(err.Error(), "unencrypted") {
			t.Errorf("%v: %v", urls, err)
		}
	}
	if _, err := New(Config{URLs: []string{"https://copilot.example.com", "unix:///run/s"}, TokenFile: file}); err != nil {
		t.Error(err)
	}
}

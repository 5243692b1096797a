package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// asked is a broker that counts calls, and answers them with serve, which can
// be replaced.
type asked struct {
	url   string
	calls atomic.Int32
	serve atomic.Pointer[http.HandlerFunc]
}

func startAsked(t *testing.T, serve http.HandlerFunc) *asked {
	t.Helper()
	b := &asked{}
	b.serve.Store(&serve)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/healthz" {
			b.calls.Add(1)
		}
		(*b.serve.Load())(w, r)
	}))
	t.Cleanup(s.Close)
	b.url = s.URL
	return b
}

func good(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/healthz" {
		w.WriteHeader(204)
		return
	}
	reply(w, goodAnswer)
}

func status(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
}

func hang(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

func newClient(t *testing.T, timeout time.Duration, urls ...string) *Client {
	t.Helper()
	c, err := New(Config{URLs: urls, Timeout: timeout})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, b := range c.brokers {
			b.http.CloseIdleConnections()
		}
	})
	return c
}

// unprobed puts probes off, which a slow machine would else see in the middle of
// a test.
func unprobed(c *Client) {
	for _, b := range c.brokers {
		b.mu.Lock()
		b.probeAt = time.Now().Add(time.Hour)
		b.mu.Unlock()
	}
}

// deadAddress returns the URL of nobody.
func deadAddress(t *testing.T) string {
	t.Helper()
	return "http://" + loopbacktest.FreeAddress(t)
}

// TestNextBroker has the first of two brokers give no usable answer. It costs
// one call one try, and the next call nothing.
func TestNextBroker(t *testing.T) {
	for name, serve := range map[string]http.HandlerFunc{
		"overloaded":  status(429),
		"fails":       status(500),
		"unavailable": status(503),
		"redirects":   func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/login", http.StatusFound) },
		"web page":    func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") },
		"another KEK": func(w http.ResponseWriter, _ *http.Request) {
			reply(w, strings.ReplaceAll(goodAnswer, `"a"`, `"b"`))
		},
		"breaks off": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "900")
			fmt.Fprint(w, "{")
		},
		"hangs up":     func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
		"hangs":        hang,
		"is not there": nil,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bad, calls := deadAddress(t), func() int32 { return 1 }
			if serve != nil {
				b := startAsked(t, serve)
				bad, calls = b.url, b.calls.Load
			}
			second := startAsked(t, good)
			c := newClient(t, time.Minute, bad, second.url)
			if name == "hangs" {
				c.try = 5 * time.Second
			}
			for range 5 {
				unprobed(c)
				if kek, err := c.KEK(t.Context(), "a", 0); err != nil || len(kek.Key) != 32 {
					t.Errorf("got %d bytes, %v", len(kek.Key), err)
				}
			}
			if calls() != 1 || second.calls.Load() != 5 {
				t.Errorf("%d and %d calls, want 1 and 5", calls(), second.calls.Load())
			}
		})
	}
}

// TestFinalAnswer checks that a broker which says no is believed.
func TestFinalAnswer(t *testing.T) {
	for code, is := range map[int]error{400: ErrRejected, 403: ErrForbidden, 404: ErrNotFound, 409: ErrRejected} {
		first, second := startAsked(t, func(w http.ResponseWriter, _ *http.Request) { refuse(w, code, "no") }), startAsked(t, good)
		c := newClient(t, time.Minute, first.url, second.url)
		unprobed(c)
		for range 2 {
			if _, err := c.KEK(t.Context(), "a", 0); !errors.Is(err, is) || errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), first.url) {
				t.Errorf("%d: %v", code, err)
			}
		}
		if first.calls.Load() != 2 || second.calls.Load() != 0 {
			t.Errorf("%d: %d and %d calls, want 2 and 0", code, first.calls.Load(), second.calls.Load())
		}
	}
}

// TestDeniedByKMS has copilot's KMS deny it the KEK. Another copilot may be allowed to
// use it, and asking the same one again does not help.
func TestDeniedByKMS(t *testing.T) {
	denied, second := startAsked(t, func(w http.ResponseWriter, _ *http.Request) { refuse(w, 502, "the KMS forbids it") }), startAsked(t, good)
	if _, err := newClient(t, time.Minute, denied.url, second.url).KEK(t.Context(), "a", 0); err != nil || denied.calls.Load() != 1 {
		t.Errorf("another is there: %d calls, %v", denied.calls.Load(), err)
	}
	if _, err := newClient(t, time.Minute, denied.url).KEK(t.Context(), "a", 0); !errors.Is(err, ErrUnavailable) || denied.calls.Load() != 2 {
		t.Errorf("alone: %d calls, %v", denied.calls.Load(), err)
	}
}

// TestNoBroker checks that all are tried, again where that may help, within the
// time that there is, and that the error names each.
func TestNoBroker(t *testing.T) {
	t.Parallel()
	hangs, page, down := startAsked(t, hang), startAsked(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "SECRET") }), startAsked(t, status(503))
	dead := deadAddress(t)
	const timeout = 10 * time.Second
	c := newClient(t, timeout, hangs.url, page.url, dead, down.url)
	c.try = time.Second
	for range 2 {
		start := time.Now()
		_, err := c.KEK(t.Context(), "a", 0)
		if took := time.Since(start); took > 2*timeout {
			t.Errorf("it took %s", took)
		}
		if !errors.Is(err, ErrUnavailable) || strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), "SECRET") {
			t.Fatalf("got %v", err)
		}
		for _, part := range strings.Split(err.Error(), "; ") {
			want := map[string]string{hangs.url: "no response within", page.url: "text/plain", dead: "refused", down.url: "503"}
			url := strings.Fields(part[strings.Index(part, "copilot at ")+len("copilot at "):])[0]
			if url = strings.TrimSuffix(url, ":"); !strings.Contains(part, want[url]) && !strings.Contains(part, "no response within") {
				t.Errorf("of %s it says %q", url, part)
			}
		}
		if n := strings.Count(err.Error(), "copilot at "); n != 4 {
			t.Errorf("%d brokers are named in %q", n, err)
		}
	}
	if page.calls.Load() < 3 || down.calls.Load() < 3 {
		t.Errorf("the one with the web page was asked %d times in two calls, the one that is unavailable %d times", page.calls.Load(), down.calls.Load())
	}
}

// TestBrokerComesBack checks that a broker which failed is asked again once it
// answers a probe, and that it is probed less and less often until then.
func TestBrokerComesBack(t *testing.T) {
	first, second := startAsked(t, status(503)), startAsked(t, good)
	c := newClient(t, time.Minute, first.url, second.url)
	ask := func() {
		t.Helper()
		if _, err := c.KEK(t.Context(), "a", 0); err != nil {
			t.Error(err)
		}
	}
	ask()
	b := c.brokers[0]
	due := func() { // its time has come
		b.mu.Lock()
		before := b.failures
		b.probeAt = time.Time{}
		b.mu.Unlock()
		ask()
		for range 6000 { // a minute
			b.mu.Lock()
			done := !b.probing && (b.failures > before || !b.down)
			b.mu.Unlock()
			if done {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Fatal("it is not probed")
	}
	var last time.Duration
	for range 4 {
		began := time.Now()
		due()
		b.mu.Lock()
		wait, left := b.probeAt.Sub(began), time.Until(b.probeAt) // it is avoided for no longer, and no shorter
		b.mu.Unlock()
		if wait < last || left > mostAvoid {
			t.Errorf("it is avoided for %s, after %s", wait, last)
		}
		last = left / 2
	}
	if n := first.calls.Load(); n != 1 {
		t.Errorf("it got %d calls while it was down", n)
	}
	h := http.HandlerFunc(good)
	first.serve.Store(&h)
	due()
	b.mu.Lock()
	b.rtt = 0 // it is the nearest
	b.mu.Unlock()
	before := second.calls.Load()
	ask()
	if first.calls.Load() != 2 || second.calls.Load() != before {
		t.Errorf("%d calls, want one more now that it is back", first.calls.Load())
	}
}

// TestNearest has the second of two brokers be nearer.
func TestNearest(t *testing.T) {
	first := startAsked(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/healthz" { // by which it is measured
			time.Sleep(time.Second)
		}
		good(w, r)
	})
	second := startAsked(t, good)
	c := newClient(t, time.Minute, first.url, second.url)
	unprobed(c)
	for range 3 { // not measured yet
		if _, err := c.KEK(t.Context(), "a", 0); err != nil {
			t.Fatal(err)
		}
	}
	if n := second.calls.Load(); n != 0 {
		t.Errorf("the second was called %d times before any was measured", n)
	}
	for range 600 { // a minute, in which the nearer one may seem farther for once
		for _, b := range c.brokers {
			b.mu.Lock()
			b.probeAt = time.Time{}
			b.mu.Unlock()
		}
		if _, err := c.KEK(t.Context(), "a", 0); err != nil {
			t.Fatal(err)
		}
		if second.calls.Load() > 3 {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	before := first.calls.Load()
	for range 5 {
		if _, err := c.KEK(t.Context(), "a", 0); err != nil {
			t.Fatal(err)
		}
	}
	if n := first.calls.Load() - before; n != 0 {
		t.Errorf("the one farther away got %d of 5 calls", n)
	}
}

// TestGivenUp checks that no broker is blamed when the caller gives up.
func TestGivenUp(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	first, second := startAsked(t, func(w http.ResponseWriter, r *http.Request) {
		cancel()
		hang(w, r)
	}), startAsked(t, good)
	c := newClient(t, time.Minute, first.url, second.url)
	if _, err := c.KEK(ctx, "a", 0); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if avoided, _ := c.brokers[0].look(); avoided || second.calls.Load() != 0 {
		t.Error("the broker is avoided, or the next was asked")
	}
}

// TestManyCalls has brokers come and go while many ask.
func TestManyCalls(t *testing.T) {
	brokers := []*asked{startAsked(t, good), startAsked(t, good), startAsked(t, good)}
	c := newClient(t, time.Minute, brokers[0].url, brokers[1].url, brokers[2].url)
	for _, b := range c.brokers {
		b.probeAt = time.Time{}
	}
	ok, down := http.HandlerFunc(good), status(503)
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() {
			for range 40 {
				if _, err := c.KEK(t.Context(), "a", 0); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range 20 {
		brokers[i%3].serve.Store(&down)
		time.Sleep(3 * time.Millisecond)
		brokers[i%3].serve.Store(&ok)
	}
	callers.Wait()
}

// TestCheck returns which brokers do not answer.
func TestCheck(t *testing.T) {
	up, dead, stranger := startAsked(t, good), deadAddress(t), startAsked(t, status(404))
	if err := newClient(t, time.Minute, up.url).Check(t.Context()); err != nil {
		t.Errorf("one that answers: %v", err)
	}
	if err := newClient(t, time.Minute, stranger.url).Check(t.Context()); err == nil || !strings.Contains(err.Error(), "not from copilot") {
		t.Errorf("something else in its place: %v", err)
	}
	// The original has no /healthz.
	if err := newClient(t, time.Minute, stranger.url+originalPath).Check(t.Context()); err != nil {
		t.Errorf("the original: %v", err)
	}
	err := newClient(t, time.Minute, dead, up.url).Check(t.Context())
	if err == nil || !strings.Contains(err.Error(), dead) || strings.Contains(err.Error(), up.url) {
		t.Errorf("one of two: %v", err)
	}
}

// TestNoHandshake has the first broker accept connections and do no more, as one
// does that is stopped.
func TestNoHandshake(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var connections atomic.Int32
	var conns []net.Conn
	accepts := make(chan struct{})
	go func() {
		defer close(accepts)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			connections.Add(1)
			conns = append(conns, conn)
		}
	}()
	defer func() {
		l.Close()
		<-accepts
		for _, conn := range conns {
			conn.Close()
		}
	}()
	second := startAsked(t, good)
	// A try may last for long, and connecting for connectTimeout only.
	c := newClient(t, time.Hour, "https://"+l.Addr().String(), second.url)
	start := time.Now()
	for range 3 {
		unprobed(c)
		if _, err := c.KEK(t.Context(), "a", 0); err != nil {
			t.Error(err)
		}
	}
	if took := time.Since(start); took > 20*connectTimeout {
		t.Errorf("it took %s", took)
	}
	if n := connections.Load(); n != 1 {
		t.Errorf("it was connected to %d times, want once", n)
	}
}

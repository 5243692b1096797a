package harness

import (
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"
	"time"
)

// FrontRegistry starts a server in front of a registry, which wrap makes do what a bad
// registry or network does, and returns its address.
func FrontRegistry(t testing.TB, registry string, wrap func(http.Handler) http.HandlerFunc) (address string) {
	t.Helper()
	forward := &httputil.ReverseProxy{ErrorLog: log.New(io.Discard, "", 0), FlushInterval: -1, Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(&url.URL{Scheme: "http", Host: registry})
		r.Out.Host = r.In.Host
	}}
	s := httptest.NewUnstartedServer(wrap(forward))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.Start()
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
	return strings.TrimPrefix(s.URL, "http://")
}

// Throttled reads and writes no more than so many bytes a second in each request.
func Throttled(bytesPerSecond int) func(http.Handler) http.HandlerFunc {
	return func(h http.Handler) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			r.Body = io.NopCloser(&slowly{r.Body, nil, bytesPerSecond})
			h.ServeHTTP(&slowly{nil, w, bytesPerSecond}, r)
		}
	}
}

type slowly struct {
	io.Reader
	http.ResponseWriter
	rate int
}

func (s *slowly) wait(n int) { time.Sleep(time.Duration(n) * time.Second / time.Duration(s.rate)) }

func (s *slowly) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p[:min(len(p), s.rate/10)])
	s.wait(n)
	return n, err
}

func (s *slowly) Write(p []byte) (done int, err error) {
	for len(p) > 0 {
		n, err := s.ResponseWriter.Write(p[:min(len(p), s.rate/10)])
		done, p = done+n, p[n:]
		if err != nil {
			return done, err
		}
		s.wait(n)
	}
	return done, nil
}

func (s *slowly) Flush() { s.ResponseWriter.(http.Flusher).Flush() }

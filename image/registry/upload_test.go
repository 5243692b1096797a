package registry

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// TestStreamedUploadsEnd has a registry that takes no chunks behave badly when it gets a
// blob in one request.
func TestStreamedUploadsEnd(t *testing.T) {
	defer func(d time.Duration) { streamWithin = d }(streamWithin)
	streamWithin = time.Second
	done := make(chan struct{})
	for name, answer := range map[string]http.HandlerFunc{
		"takes nothing": func(http.ResponseWriter, *http.Request) { <-done },
		"endless error": func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusTeapot)
			b := make([]byte, 1<<20)
			for {
				if _, err := w.Write(b); err != nil {
					return
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				switch {
				case r.Method == http.MethodPost:
					w.Header().Set("Location", "/v2/app/blobs/uploads/1")
					w.WriteHeader(http.StatusAccepted)
				case r.Method == http.MethodPatch && r.Header.Get("Content-Range") != "":
					w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
				case r.Method == http.MethodPatch:
					answer(w, r)
				default:
					w.WriteHeader(http.StatusNoContent)
				}
			}))
			defer s.Close()
			defer s.CloseClientConnections()
			if name == "takes nothing" {
				defer close(done)
			}
			w := writer(t, s)
			defer w.Close()
			var err error
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			for range 64 {
				if _, err = w.Write(make([]byte, 1<<20)); err != nil {
					break
				}
			}
			runtime.ReadMemStats(&after)
			if err == nil {
				t.Fatal("it was written")
			}
			if name == "takes nothing" && !errors.Is(err, errNotTaken) {
				t.Error(err)
			}
			if grown := after.TotalAlloc - before.TotalAlloc; grown > 256<<20 {
				t.Errorf("%d bytes were allocated", grown)
			}
		})
	}
}

// TestFullRegistryIsNamed has a registry, as distribution 3 does, say once that it can't write,
// and after that only that the upload goes on at a wrong place.
func TestFullRegistryIsNamed(t *testing.T) {
	var size, tries int64
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Location", "/v2/app/blobs/uploads/1")
		switch r.Method {
		case http.MethodPost:
			w.WriteHeader(http.StatusAccepted)
		case http.MethodPatch:
			n, _ := io.Copy(io.Discard, r.Body)
			switch tries++; tries {
			case 1:
				size = n
				w.WriteHeader(http.StatusAccepted)
			case 2:
				http.Error(w, "no space left on device", http.StatusInternalServerError)
			default:
				w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			}
		default:
			has := size + 1000
			if tries > 2 {
				has = size - 1000
			}
			w.Header().Set("Range", fmt.Sprintf("0-%d", has-1))
			w.WriteHeader(http.StatusNoContent)
		}
	}))
	defer s.Close()
	w := writer(t, s)
	defer w.Close()
	var err error
	for range 64 {
		if _, err = w.Write(make([]byte, 1<<20)); err != nil {
			break
		}
	}
	if err == nil || !strings.Contains(err.Error(), "of which it took") || !strings.Contains(err.Error(), "416") || !strings.Contains(err.Error(), "500") {
		t.Errorf("got %v", err)
	}
}

// writer returns a writer of a blob to a registry.
func writer(t *testing.T, s *httptest.Server) content.Writer {
	t.Helper()
	r, err := Open(t.Context(), strings.TrimPrefix(s.URL, "http://")+"/app:1", docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost)))
	if err != nil {
		t.Fatal(err)
	}
	w, err := r.Writer(t.Context(), content.WithRef("x"))
	if err != nil {
		t.Fatal(err)
	}
	return w
}

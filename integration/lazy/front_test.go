package lazy

import (
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// front is a proxy before the registry, which counts, and answers as it is made to.
type front struct {
	address string

	mu     sync.Mutex
	answer func(w http.ResponseWriter, r *http.Request, forward http.Handler)
	sent   int64 // bytes of blobs
	ranges []string
}

func newFront(t testing.TB, registry string) *front {
	t.Helper()
	f := &front{}
	f.address = harness.FrontRegistry(t, registry, func(forward http.Handler) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			isBlob := r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/")
			f.mu.Lock()
			answer := f.answer
			if isBlob {
				f.ranges = append(f.ranges, r.Header.Get("Range"))
			}
			f.mu.Unlock()
			if isBlob {
				w = &counter{w, f}
			}
			if answer == nil {
				forward.ServeHTTP(w, r)
				return
			}
			answer(w, r, forward)
		}
	})
	return f
}

// set has the registry answer in another way.
func (f *front) set(answer func(w http.ResponseWriter, r *http.Request, forward http.Handler)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answer = answer
}

// count returns how many bytes of blobs were sent since it was called last.
func (f *front) count() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.sent
	f.sent, f.ranges = 0, nil
	return n
}

type counter struct {
	http.ResponseWriter
	front *front
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.front.mu.Lock()
	defer c.front.mu.Unlock()
	c.front.sent += int64(n)
	return n, err
}

func (c *counter) Unwrap() http.ResponseWriter { return c.ResponseWriter }

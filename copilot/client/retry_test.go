package client

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestRetryAfter has a broker ask many at once to retry after a second: they
// do, and not all at once.
func TestRetryAfter(t *testing.T) {
	t.Parallel()
	const clients = 30
	var mu sync.Mutex
	refused := make(map[string]time.Time) // by KEK, of which each client asks for one
	var after []time.Duration
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if at, ok := refused[r.URL.Path]; ok {
			after = append(after, time.Since(at))
			reply(w, fmt.Sprintf(`{"id":%q,"version":1,"key":"AAAAAAAAAAAAAAAAAAAAAA=="}`, strings.Split(r.URL.Path, "/")[4]))
			return
		}
		refused[r.URL.Path] = time.Now()
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(http.StatusTooManyRequests)
	}))
	defer s.Close()
	var wg sync.WaitGroup
	for i := range clients {
		c, err := New(Config{URLs: []string{s.URL}, Timeout: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			if _, err := c.KEK(t.Context(), fmt.Sprint("team-", i), 0); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(after) != clients {
		t.Fatalf("%d came back", len(after))
	}
	slices.Sort(after)
	if after[0] < 990*time.Millisecond {
		t.Errorf("one came back after %s", after[0])
	}
	if spread := after[clients-1] - after[0]; spread < 40*time.Millisecond {
		t.Errorf("all came back within %s", spread)
	}
}

package copilot

import (
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"
)

// TestRetryAfter has a broker tell many at once to come back in a second: they
// do, and not all at once.
func TestRetryAfter(t *testing.T) {
	t.Parallel()
	const clients = 30
	var mu sync.Mutex
	var refused time.Time // the last
	var again []time.Time
	asked := 0
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if asked++; asked > clients {
			again = append(again, time.Now())
			w.Write([]byte(goodAnswer))
			return
		}
		refused = time.Now()
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(http.StatusTooManyRequests)
	}))
	defer s.Close()
	var wg sync.WaitGroup
	for range clients {
		c, err := New(Config{URLs: []string{s.URL}})
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			if _, err := c.KEK(t.Context(), "a", 0); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	slices.SortFunc(again, time.Time.Compare)
	if len(again) != clients || again[0].Sub(refused) < 800*time.Millisecond {
		t.Fatalf("%d came back, the first after %s", len(again), again[0].Sub(refused))
	}
	if spread := again[clients-1].Sub(again[0]); spread < 40*time.Millisecond {
		t.Errorf("all came back within %s", spread)
	}
}

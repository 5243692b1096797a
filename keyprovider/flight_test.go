package keyprovider

import (
	"bytes"
	"context"
	"sync"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot/client"
)

// TestFetchedKeyCleared has many callers share fetches, some of whom give up.
// Each that stays gets the key, and no copy of the cache's outlives them.
func TestFetchedKeyCleared(t *testing.T) {
	for _, test := range []struct{ stay, giveUp int }{{20, 0}, {10, 10}, {0, 10}} {
		c := newCounted(time.Hour, 0, 0) // nothing is kept
		fetched := bytes.Repeat([]byte("k"), 32)
		asked, answer := make(chan bool), make(chan bool)
		c.fetch = func(context.Context, string, int) (client.KEK, error) {
			asked <- true
			<-answer
			return client.KEK{ID: "a", Version: 1, Key: fetched}, nil
		}
		ctx, cancel := context.WithCancel(t.Context())
		var stay, giveUp sync.WaitGroup
		for range test.giveUp {
			giveUp.Go(func() {
				if kek, err := c.get(ctx, "a", 1); err == nil || kek.Key != nil {
					t.Errorf("given up: %v, %v", kek, err)
				}
			})
		}
		for range test.stay {
			stay.Go(func() {
				kek, err := c.get(t.Context(), "a", 1)
				if err != nil || !bytes.Equal(kek.Key, bytes.Repeat([]byte("k"), 32)) {
					t.Errorf("got %q, %v", kek.Key, err)
				}
				clear(kek.Key)
			})
		}
		<-asked
		waiting := func() (n int) {
			c.flights.mu.Lock()
			defer c.flights.mu.Unlock()
			for _, f := range c.flights.current {
				n += f.waiting
			}
			return n
		}
		for waiting() != test.stay+test.giveUp {
			time.Sleep(time.Millisecond)
		}
		cancel()
		giveUp.Wait()
		answer <- true
		stay.Wait()
		for range 6000 { // a minute
			c.flights.mu.Lock()
			landed, cleared := len(c.flights.current) == 0, fetched[0] == 0 && fetched[31] == 0
			c.flights.mu.Unlock()
			if landed && cleared {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if fetched[0] != 0 || fetched[31] != 0 {
			t.Errorf("%d stay and %d give up: the key that was fetched is still in memory", test.stay, test.giveUp)
		}
	}
}

package keyprovider

import (
	"errors"
	"sync"
	"testing"
	"time"
)

// wraps takes the current version to wrap n layer keys, and checks how many
// fetches there were in all.
func (c *counted) wraps(t *testing.T, n int, fetches int32) {
	t.Helper()
	for range n {
		if kek, err := c.toWrap(t.Context(), "a"); err != nil || string(kek.Key) != "a" {
			t.Fatalf("got %+v, %v", kek, err)
		}
	}
	if got := c.fetches.Load(); got != fetches {
		t.Errorf("%d fetches, want %d", got, fetches)
	}
}

func TestWrapBudget(t *testing.T) {
	c := newCounted(0, 0, 10)
	c.wraps(t, WrapBudget, 1)
	c.expect(t, "a", 0, 1) // to unwrap with
	c.expect(t, "a", 5, 1)
	c.wraps(t, 1, 2)
	c.wraps(t, WrapBudget-1, 2)
	c.wraps(t, 1, 3)
	newCounted(0, 0, 0).wraps(t, 3, 3)
}

// TestWrapBudgetByNumber checks that a version which is fetched by its number
// has no budget of its own.
func TestWrapBudgetByNumber(t *testing.T) {
	c := newCounted(10*time.Second, 0, 10)
	c.expect(t, "a", 5, 1)
	c.wraps(t, WrapBudget/2, 2)
	c.pass(9 * time.Second)
	c.wraps(t, WrapBudget/2, 2)
	c.entries[cacheKey{"a", 5}].Value.(*cacheEntry).fetched = time.Time{} // past its ttl, but known to be current
	c.expect(t, "a", 5, 3)
	c.wraps(t, 1, 4)
}

// TestWrapBudgetInOutage checks that an outage gives no other budget.
func TestWrapBudgetInOutage(t *testing.T) {
	c := newGraceful(0)
	c.wraps(t, WrapBudget-1, 1)
	c.err = errDown
	c.pass(10 * time.Second)
	c.wraps(t, 1, 2)
	for range 2 {
		if kek, err := c.toWrap(t.Context(), "a"); !errors.Is(err, errDown) {
			t.Errorf("got %+v, %v", kek, err)
		}
	}
	c.expect(t, "a", 0, 2)
	c.err = nil
	c.pass(errorTTL)
	c.wraps(t, 1, 3)
}

// TestWrapBudgetAtOnce has many wrap at once, with and without a cache.
func TestWrapBudgetAtOnce(t *testing.T) {
	for _, size := range []int{0, 10} {
		c := newCounted(0, 0, size)
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				for range 100 {
					if _, err := c.toWrap(t.Context(), "a"); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		if got := c.fetches.Load(); size > 0 && got != 5 || got < 5 {
			t.Errorf("size %d: %d fetches for 5000 layer keys", size, got)
		}
	}
}

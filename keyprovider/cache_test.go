package keyprovider

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/keyprovider/copilot"
)

// counted is a cache whose clock the test moves and whose fetches it counts.
type counted struct {
	cache
	clock   time.Time
	fetches atomic.Int32
	err     error
}

func newCounted(ttl, idle time.Duration, size int) *counted {
	c := &counted{clock: time.Unix(1e9, 0)}
	c.cache = cache{ttl: ttl, idle: idle, size: size, now: func() time.Time { return c.clock },
		fetch: func(_ context.Context, id string, version int) (copilot.KEK, error) {
			c.fetches.Add(1)
			if c.err != nil {
				return copilot.KEK{}, c.err
			}
			if version == 0 {
				version = 5
			}
			return copilot.KEK{ID: id, Version: version, Key: []byte(id)}, nil
		}}
	return c
}

// expect gets a KEK and checks how many fetches there were in all.
func (c *counted) expect(t *testing.T, id string, version int, fetches int32) {
	t.Helper()
	kek, err := c.get(t.Context(), id, version)
	if err != nil || kek.ID != id || version != 0 && kek.Version != version {
		t.Errorf("got %+v, %v", kek, err)
	}
	if got := c.fetches.Load(); got != fetches {
		t.Errorf("%s version %d: %d fetches, want %d", id, version, got, fetches)
	}
}

func TestCacheTTL(t *testing.T) {
	c := newCounted(10*time.Second, 0, 10)
	c.expect(t, "a", 0, 1)
	c.expect(t, "a", 5, 1) // the current version is known by its number too
	c.expect(t, "a", 4, 2)
	c.expect(t, "b", 0, 3)
	c.clock = c.clock.Add(9 * time.Second)
	c.expect(t, "a", 0, 3)
	c.clock = c.clock.Add(time.Second)
	c.expect(t, "a", 0, 4) // use does not lengthen it
}

func TestCacheIdle(t *testing.T) {
	c := newCounted(0, 10*time.Second, 10)
	c.expect(t, "a", 5, 1)
	for range 5 {
		c.clock = c.clock.Add(9 * time.Second)
		c.expect(t, "a", 5, 1)
	}
	c.clock = c.clock.Add(10 * time.Second)
	c.expect(t, "a", 5, 2)
}

func TestCacheSize(t *testing.T) {
	c := newCounted(time.Hour, 0, 2)
	c.expect(t, "a", 1, 1)
	c.expect(t, "b", 1, 2)
	c.expect(t, "a", 1, 2)
	c.expect(t, "c", 1, 3) // pushes out b, the least recently used
	c.expect(t, "a", 1, 3)
	c.expect(t, "b", 1, 4)
	if n := c.recent.Len(); n != 2 || len(c.entries) != 2 {
		t.Errorf("%d entries", n)
	}
	none := newCounted(time.Hour, 0, 0)
	none.expect(t, "a", 1, 1)
	none.expect(t, "a", 1, 2)
}

func TestCacheSweep(t *testing.T) {
	c := newCounted(10*time.Second, 0, 10)
	c.expect(t, "a", 1, 1)
	c.clock = c.clock.Add(5 * time.Second)
	c.expect(t, "b", 1, 2)
	c.clock = c.clock.Add(5 * time.Second)
	c.sweep()
	if len(c.entries) != 1 || c.recent.Len() != 1 {
		t.Errorf("%d entries are left, want b only", len(c.entries))
	}
	c.expect(t, "b", 1, 2)
}

func TestCacheErrors(t *testing.T) {
	c := newCounted(time.Hour, 0, 10)
	c.err = errors.New("broker down")
	for range 3 {
		if _, err := c.get(t.Context(), "a", 1); !errors.Is(err, c.err) {
			t.Errorf("got %v", err)
		}
	}
	if got := c.fetches.Load(); got != 1 {
		t.Errorf("%d fetches while the error is fresh, want 1", got)
	}
	c.err = nil
	c.clock = c.clock.Add(errorTTL)
	c.expect(t, "a", 1, 2)
}

// TestCacheOneFetch has many callers ask at once, the first of whom gives up.
func TestCacheOneFetch(t *testing.T) {
	asked, answer := make(chan struct{}), make(chan struct{})
	var fetches atomic.Int32
	c := &cache{ttl: time.Hour, size: 10, now: time.Now,
		fetch: func(ctx context.Context, id string, version int) (copilot.KEK, error) {
			if fetches.Add(1) == 1 {
				close(asked)
			}
			<-answer
			return copilot.KEK{ID: id, Version: version}, ctx.Err()
		}}
	first, giveUp := context.WithCancel(t.Context())
	gaveUp := make(chan error)
	go func() {
		_, err := c.get(first, "a", 1)
		gaveUp <- err
	}()
	<-asked
	giveUp()
	if err := <-gaveUp; !errors.Is(err, context.Canceled) {
		t.Errorf("the caller that gave up got %v", err)
	}
	var wg sync.WaitGroup
	errs := make(chan error, 100)
	for range 100 {
		wg.Go(func() {
			kek, err := c.get(t.Context(), "a", 1)
			if err == nil && kek.ID != "a" {
				err = fmt.Errorf("got %+v", kek)
			}
			errs <- err
		})
	}
	time.Sleep(10 * time.Millisecond)
	close(answer)
	wg.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			t.Error(err)
		}
	}
	if got := fetches.Load(); got != 1 {
		t.Errorf("%d fetches, want 1", got)
	}
}

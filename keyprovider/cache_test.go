package keyprovider

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot/client"
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
		fetch: func(_ context.Context, id string, version int) (client.KEK, error) {
			c.fetches.Add(1)
			if c.err != nil {
				return client.KEK{}, c.err
			}
			if version == 0 {
				version = 5
			}
			return client.KEK{ID: id, Version: version, Key: []byte(id)}, nil
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

// fail gets a KEK that can't be fetched and checks how many fetches there were
// in all.
func (c *counted) fail(t *testing.T, id string, version int, fetches int32) {
	t.Helper()
	if kek, err := c.get(t.Context(), id, version); !errors.Is(err, c.err) {
		t.Errorf("got %+v, %v", kek, err)
	}
	if got := c.fetches.Load(); got != fetches {
		t.Errorf("%s version %d: %d fetches, want %d", id, version, got, fetches)
	}
}

// TestCacheErrorsAside checks that a failure takes no KEK's place.
func TestCacheErrorsAside(t *testing.T) {
	c := newCounted(10*time.Second, 0, 2)
	c.expect(t, "a", 4, 1)
	c.clock = c.clock.Add(5 * time.Second)
	c.expect(t, "a", 0, 2)
	c.clock = c.clock.Add(6 * time.Second)
	c.err = errors.New("broker down")
	c.fail(t, "a", 4, 3) // has expired
	c.expect(t, "a", 0, 3)
	c.expect(t, "a", 5, 3)

	// Naming KEKs that do not exist pushes none out, and does not
	// fill the memory.
	down := c.err
	c.err = nil
	c.expect(t, "b", 0, 4) // now there are as many as can be
	c.err = down
	for i := range int32(300) {
		c.fail(t, fmt.Sprintf("nobody-%d", i), 0, 5+i)
	}
	c.fail(t, "nobody-299", 0, 304)
	c.expect(t, "a", 0, 304)
	c.expect(t, "b", 0, 304)
	if n := len(c.failed); n > maxErrors {
		t.Errorf("%d failures are remembered", n)
	}
	c.clock = c.clock.Add(errorTTL)
	c.sweep()
	if n := len(c.failed); n != 0 {
		t.Errorf("%d failures are remembered although they have expired", n)
	}
}

// TestCacheLateError has a fetch fail after another one got the same KEK.
func TestCacheLateError(t *testing.T) {
	asked, fail := make(chan struct{}), make(chan struct{})
	down := errors.New("broker down")
	var fetches atomic.Int32
	c := &cache{size: 10, now: time.Now, fetch: func(_ context.Context, id string, version int) (client.KEK, error) {
		fetches.Add(1)
		if version == 0 {
			return client.KEK{ID: id, Version: 5, Key: []byte("key")}, nil
		}
		close(asked)
		<-fail
		return client.KEK{}, down
	}}
	late := make(chan error)
	go func() {
		_, err := c.get(t.Context(), "a", 5)
		late <- err
	}()
	<-asked
	if _, err := c.get(t.Context(), "a", 0); err != nil {
		t.Error(err)
	}
	close(fail)
	if err := <-late; !errors.Is(err, down) {
		t.Errorf("the one that failed: %v", err)
	}
	for _, version := range []int{0, 5} {
		if kek, err := c.get(t.Context(), "a", version); err != nil || string(kek.Key) != "key" {
			t.Errorf("version %d: %+v, %v", version, kek, err)
		}
	}
	if got := fetches.Load(); got != 2 {
		t.Errorf("%d fetches, want 2", got)
	}
}

func TestCacheOfNone(t *testing.T) {
	c := newCounted(0, 0, 0)
	c.err = errors.New("broker down")
	c.fail(t, "a", 0, 1)
	c.clock = c.clock.Add(errorTTL - 1)
	c.fail(t, "a", 0, 1)
	c.clock = c.clock.Add(1)
	c.fail(t, "a", 0, 2)
	c.err = nil
	c.clock = c.clock.Add(errorTTL)
	c.expect(t, "a", 0, 3)
	c.expect(t, "a", 0, 4)
	if len(c.entries) != 0 || c.recent.Len() != 0 {
		t.Error("a KEK is kept")
	}
}

// TestCacheCopies has callers clear the keys that they got, as they do, while
// others use theirs and the cache drops its own.
func TestCacheCopies(t *testing.T) {
	for _, size := range []int{0, 1, 10} {
		c := newCounted(0, 0, size)
		var wg sync.WaitGroup
		for i := range 50 {
			wg.Go(func() {
				for _, id := range []string{"a", "b"} {
					kek, err := c.get(t.Context(), id, i%3)
					if err != nil || string(kek.Key) != id {
						t.Errorf("size %d: got %q for %s, %v", size, kek.Key, id, err)
					}
					clear(kek.Key)
				}
			})
		}
		wg.Wait()
	}
}

// TestCacheClears checks that a KEK which is dropped is not left in memory.
func TestCacheClears(t *testing.T) {
	c := newCounted(0, 0, 1)
	c.expect(t, "a", 1, 1)
	kept := c.entries[cacheKey{"a", 1}].Value.(*cacheEntry).kek.Key
	c.expect(t, "b", 1, 2)
	if string(kept) != "\x00" {
		t.Errorf("the key that was pushed out is still %q", kept)
	}
}

func TestCacheDone(t *testing.T) {
	c := newCounted(0, 0, 10)
	done, cancel := context.WithCancel(t.Context())
	cancel()
	for _, version := range []int{0, 1} {
		if _, err := c.get(done, "a", version); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	}
	if got := c.fetches.Load(); got != 0 {
		t.Errorf("%d fetches for nobody", got)
	}
}

// TestCacheOneFetch has many callers ask at once, the first of whom gives up.
func TestCacheOneFetch(t *testing.T) {
	asked, answer := make(chan struct{}), make(chan struct{})
	var fetches atomic.Int32
	c := &cache{ttl: time.Hour, size: 10, now: time.Now,
		fetch: func(ctx context.Context, id string, version int) (client.KEK, error) {
			if fetches.Add(1) == 1 {
				close(asked)
			}
			<-answer
			return client.KEK{ID: id, Version: version}, ctx.Err()
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

// TestCacheClock has the machine's clock moved. Nobody can do that to a process
// from outside without doing it to the whole machine: time namespaces have no
// such clock, and Go asks the kernel without the C library. So this checks that
// the times which the cache compares have a monotonic reading, which no setting
// of the clock moves, and what comes of times without one.
func TestCacheClock(t *testing.T) {
	p := New(nil, Config{CacheTTL: time.Hour, CacheSize: 10})
	p.keks.fetch = newCounted(0, 0, 0).fetch
	if _, err := p.keks.latest(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	p.keks.miss(cacheKey{"b", 0}, client.ErrUnavailable, true)
	p.keks.miss(cacheKey{"c", 0}, client.ErrNotExported, true)
	e := p.keks.recent.Front().Value.(*cacheEntry)
	for name, at := range map[string]time.Time{
		"now": p.keks.now(), "fetched": e.fetched, "current": e.isCurrent, "used": e.used,
		"failed": p.keks.failed[cacheKey{"b", 0}].at, "kept": p.keks.notExported["c"].at,
	} {
		if !strings.Contains(at.String(), " m=+") {
			t.Errorf("%s: %s follows the clock", name, at)
		}
	}

	// newCounted's times follow the clock.
	const day = 24 * time.Hour
	c := newCounted(time.Hour, 0, 10)
	c.grace = 2 * time.Hour
	c.expect(t, "a", 0, 1)
	c.clock = c.clock.Add(day)
	c.expect(t, "a", 0, 2)
	c.clock = c.clock.Add(-day)
	c.expect(t, "a", 0, 2)
	c.clock = c.clock.Add(day + time.Hour)
	c.expect(t, "a", 0, 3)
	c.err = client.ErrUnavailable
	c.clock = c.clock.Add(day) // and the grace is over
	c.fail(t, "a", 0, 4)
}

package keyprovider

import (
	"container/list"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/ctrlplane/pilot/keyprovider/copilot"
)

// errorTTL is how long a failed fetch is remembered, so that the many layers
// of an image that can't be decrypted don't each ask the broker.
const errorTTL = 2 * time.Second

// maxErrors is how many failed fetches are remembered. They have no place
// among the KEKs, which whoever names many that do not exist would push out.
const maxErrors = 256

// cache holds KEKs by id and version. Version 0 stands for whichever is
// current. It is safe for concurrent use.
type cache struct {
	fetch func(ctx context.Context, id string, version int) (copilot.KEK, error)
	ttl   time.Duration // a KEK is kept this long after it was fetched; 0: for ever
	idle  time.Duration // a KEK is kept this long after it was last used; 0: for ever
	size  int           // KEKs kept at most; 0: none
	now   func() time.Time

	flight singleflight.Group

	mu      sync.Mutex
	entries map[cacheKey]*list.Element
	current map[string]*list.Element // by id, the entries that were current when they were fetched
	recent  list.List                // of *cacheEntry, the most recently used first
	failed  map[cacheKey]failure
}

type cacheKey struct {
	id      string
	version int
}

type cacheEntry struct {
	key       cacheKey
	kek       copilot.KEK
	fetched   time.Time
	isCurrent time.Time // when it was last fetched as the current version, or zero
	used      time.Time
}

type failure struct {
	err error
	at  time.Time
}

// get returns a KEK, whose key the caller clears. However many callers ask for
// it at once, the broker is asked once; each stops waiting when its own ctx is
// done.
func (c *cache) get(ctx context.Context, id string, version int) (copilot.KEK, error) {
	if err := ctx.Err(); err != nil {
		return copilot.KEK{}, fmt.Errorf("KEK %q: %w", id, err)
	}
	key := cacheKey{id, version}
	if kek, err, ok := c.lookup(key); ok {
		return kek, err
	}
	fetched := c.flight.DoChan(fmt.Sprintf("%d %s", version, id), func() (any, error) {
		if kek, err, ok := c.lookup(key); ok {
			return kek, err
		}
		// The fetch serves every caller, so it must not stop with the first.
		kek, err := c.fetch(context.WithoutCancel(ctx), id, version)
		c.store(key, kek, err)
		return kek, err
	})
	select {
	case r := <-fetched:
		return copyOf(r.Val.(copilot.KEK)), r.Err
	case <-ctx.Done():
		return copilot.KEK{}, fmt.Errorf("KEK %q: %w", id, ctx.Err())
	}
}

// copyOf returns kek with a key of its own, since the cache clears the keys
// that it drops and callers those that they have used.
func copyOf(kek copilot.KEK) copilot.KEK {
	kek.Key = slices.Clone(kek.Key)
	return kek
}

// lookup returns a copy of what is known of a KEK, or how fetching it failed
// just now.
func (c *cache) lookup(key cacheKey) (_ copilot.KEK, _ error, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	el, ok := c.entries[key]
	if key.version == 0 {
		el, ok = c.current[key.id]
	}
	if ok {
		e := el.Value.(*cacheEntry)
		switch {
		case c.expired(e, now):
			c.remove(el)
		case key.version == 0 && c.ttl > 0 && now.Sub(e.isCurrent) >= c.ttl:
			delete(c.current, key.id) // another may be current by now
		default:
			e.used = now
			c.recent.MoveToFront(el)
			return copyOf(e.kek), nil, true
		}
	}
	if f, ok := c.failed[key]; ok && now.Sub(f.at) < errorTTL {
		return copilot.KEK{}, f.err, true
	}
	return copilot.KEK{}, nil, false
}

// latest returns a KEK in the version that the broker says is current, whose key
// the caller clears. What is remembered as current may have been rotated.
func (c *cache) latest(ctx context.Context, id string) (copilot.KEK, error) {
	c.mu.Lock()
	delete(c.current, id)
	c.mu.Unlock()
	return c.get(ctx, id, 0)
}

// forgetCurrent makes the next get of a KEK's current version ask which that is,
// and reports whether this can change anything: not right after it was asked.
func (c *cache) forgetCurrent(id string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	el, ok := c.current[id]
	if !ok || c.now().Sub(el.Value.(*cacheEntry).isCurrent) < errorTTL {
		return false
	}
	delete(c.current, id)
	return true
}

func (c *cache) expired(e *cacheEntry, now time.Time) bool {
	return c.ttl > 0 && now.Sub(e.fetched) >= c.ttl || c.idle > 0 && now.Sub(e.used) >= c.idle
}

func (c *cache) store(key cacheKey, kek copilot.KEK, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	if err != nil {
		if len(c.failed) >= maxErrors || c.failed == nil {
			c.failed = make(map[cacheKey]failure)
		}
		c.failed[key] = failure{err, now}
		return
	}
	delete(c.failed, key)
	if c.size <= 0 {
		return
	}
	if c.entries == nil {
		c.entries, c.current = make(map[cacheKey]*list.Element), make(map[string]*list.Element)
	}
	e := &cacheEntry{key: key, kek: copyOf(kek), fetched: now, used: now}
	if kek.Version != 0 {
		// What was wrapped with the current one will ask for it by its version.
		e.key.version = kek.Version
	}
	if el, ok := c.entries[e.key]; ok {
		c.remove(el)
	}
	el := c.recent.PushFront(e)
	c.entries[e.key] = el
	if key.version == 0 {
		e.isCurrent = now
		c.current[key.id] = el
	}
	for c.recent.Len() > c.size {
		c.remove(c.recent.Back())
	}
}

// sweep forgets what has expired, so that no KEK stays in memory only because
// nobody asks for it.
func (c *cache) sweep() {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	for el := c.recent.Front(); el != nil; {
		next := el.Next()
		if c.expired(el.Value.(*cacheEntry), now) {
			c.remove(el)
		}
		el = next
	}
	maps.DeleteFunc(c.failed, func(_ cacheKey, f failure) bool { return now.Sub(f.at) >= errorTTL })
}

func (c *cache) remove(el *list.Element) {
	e := c.recent.Remove(el).(*cacheEntry)
	delete(c.entries, e.key)
	if c.current[e.key.id] == el {
		delete(c.current, e.key.id)
	}
	clear(e.kek.Key)
}

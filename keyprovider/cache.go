package keyprovider

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/ctrlplane/pilot/keyprovider/copilot"
)

// errorTTL is how long a failed fetch is remembered, so that the many layers
// of an image that can't be decrypted don't each ask the broker.
const errorTTL = 2 * time.Second

// cache holds KEKs by id and version. Version 0 stands for whichever is
// current. It is safe for concurrent use.
type cache struct {
	fetch func(ctx context.Context, id string, version int) (copilot.KEK, error)
	ttl   time.Duration // a KEK is kept this long after it was fetched; 0: for ever
	idle  time.Duration // a KEK is kept this long after it was last used; 0: for ever
	size  int           // KEKs and errors kept at most; 0: none
	now   func() time.Time

	flight singleflight.Group

	mu      sync.Mutex
	entries map[cacheKey]*list.Element
	recent  list.List // of *cacheEntry, the most recently used first
}

type cacheKey struct {
	id      string
	version int
}

type cacheEntry struct {
	key     cacheKey
	kek     copilot.KEK
	err     error
	fetched time.Time
	used    time.Time
}

// get returns a KEK. However many callers ask for it at once, the broker is
// asked once; each stops waiting when its own ctx is done.
func (c *cache) get(ctx context.Context, id string, version int) (copilot.KEK, error) {
	key := cacheKey{id, version}
	if e, ok := c.lookup(key); ok {
		return e.kek, e.err
	}
	fetched := c.flight.DoChan(fmt.Sprintf("%d %s", version, id), func() (any, error) {
		if e, ok := c.lookup(key); ok {
			return e.kek, e.err
		}
		// The fetch serves every caller, so it must not stop with the first.
		kek, err := c.fetch(context.WithoutCancel(ctx), id, version)
		c.store(key, kek, err)
		return kek, err
	})
	select {
	case r := <-fetched:
		return r.Val.(copilot.KEK), r.Err
	case <-ctx.Done():
		return copilot.KEK{}, fmt.Errorf("KEK %q: %w", id, ctx.Err())
	}
}

// lookup returns a copy of the entry for key if there is one that still counts.
func (c *cache) lookup(key cacheKey) (cacheEntry, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	el, ok := c.entries[key]
	if !ok {
		return cacheEntry{}, false
	}
	e, now := el.Value.(*cacheEntry), c.now()
	if c.expired(e, now) {
		c.remove(el)
		return cacheEntry{}, false
	}
	e.used = now
	c.recent.MoveToFront(el)
	return *e, true
}

func (c *cache) expired(e *cacheEntry, now time.Time) bool {
	if e.err != nil {
		return now.Sub(e.fetched) >= errorTTL
	}
	return c.ttl > 0 && now.Sub(e.fetched) >= c.ttl || c.idle > 0 && now.Sub(e.used) >= c.idle
}

func (c *cache) store(key cacheKey, kek copilot.KEK, err error) {
	if errors.Is(err, context.Canceled) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	c.put(&cacheEntry{key: key, kek: kek, err: err, fetched: now, used: now})
	if err == nil && key.version == 0 && kek.Version != 0 {
		// What was wrapped with it will ask for it by its version.
		c.put(&cacheEntry{key: cacheKey{key.id, kek.Version}, kek: kek, fetched: now, used: now})
	}
}

func (c *cache) put(e *cacheEntry) {
	if el, ok := c.entries[e.key]; ok {
		c.remove(el)
	}
	if c.size <= 0 {
		return
	}
	if c.entries == nil {
		c.entries = make(map[cacheKey]*list.Element)
	}
	c.entries[e.key] = c.recent.PushFront(e)
	for c.recent.Len() > c.size {
		c.remove(c.recent.Back())
	}
}

// sweep forgets the KEKs that have expired, so that none stays in memory only
// because nobody asks for it.
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
}

func (c *cache) remove(el *list.Element) {
	delete(c.entries, c.recent.Remove(el).(*cacheEntry).key)
}

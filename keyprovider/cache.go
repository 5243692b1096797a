package keyprovider

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/layerbudget"
	"github.com/ctrlplane/pilot/internal/publickek"
	"github.com/ctrlplane/pilot/internal/traceid"
)

// errorTTL is how long a failed fetch is remembered, so that the layers of an image that
// can't be decrypted do not each ask the broker.
const errorTTL = 2 * time.Second

// outageTTL is how long a KEK past its ttl is used without asking the broker again after
// an outage, on which a layer may have waited long.
const outageTTL = 10 * time.Second

// maxErrors is how many failed fetches are remembered. They are not among the KEKs:
// naming many that do not exist would push those out.
const maxErrors = 256

// notExportedTTL is how long it is remembered that the broker does not export a KEK, if
// KEKs are kept without limit.
const notExportedTTL = 5 * time.Minute

// cache holds KEKs by id and version. Version 0 is the current one. It is safe for
// concurrent use.
type cache struct {
	fetch func(ctx context.Context, id string, version int) (client.KEK, error)
	ttl   time.Duration // a KEK is kept this long after it was fetched; 0: no limit
	grace time.Duration // and this much longer during an outage of the broker
	idle  time.Duration // a KEK is kept this long after it was last used; 0: no limit
	size  int           // KEKs kept at most; 0: none
	now   func() time.Time

	metrics *Metrics // may be nil

	flights flights

	mu          sync.Mutex
	entries     map[cacheKey]*list.Element
	current     map[string]*list.Element // by id, the entries that were current when they were fetched
	recent      list.List                // of *cacheEntry, the most recently used first
	failed      map[cacheKey]failure
	notExported map[string]failure   // by id, the KEKs that the broker does not export
	refused     map[cacheKey]failure // KEKs that the broker does not unwrap with for us
}

type cacheKey struct {
	id      string
	version int
}

type cacheEntry struct {
	key       cacheKey
	kek       client.KEK
	private   *publickek.PrivateKey // derived from the KEK, once it was needed; may be nil
	fetched   time.Time
	isCurrent time.Time // when it was last fetched as the current version, or zero
	doubted   bool      // another version may be current since
	used      time.Time
	warned    bool // that it is used past its ttl
}

type failure struct {
	err error
	at  time.Time
}

// spares reports whether f is recent enough to not ask the broker again.
func (f failure) spares(d time.Duration, now time.Time) bool {
	return f.err != nil && now.Sub(f.at) < d
}

// isOutage reports whether the broker gave no usable answer, rather than refused.
func (f failure) isOutage() bool { return errors.Is(f.err, client.ErrUnavailable) }

// get returns a KEK, whose key the caller clears. Concurrent callers share one request
// to the broker; each stops waiting when its own ctx is done.
func (c *cache) get(ctx context.Context, id string, version int) (client.KEK, error) {
	return c.obtain(ctx, cacheKey{id, version}, false)
}

// latest returns a KEK in the version that the broker says is current, whose key
// the caller clears. What is remembered as current may have been rotated, so
// without the broker nothing is wrapped.
func (c *cache) latest(ctx context.Context, id string) (client.KEK, error) {
	return c.obtain(ctx, cacheKey{id, 0}, true)
}

func (c *cache) obtain(ctx context.Context, key cacheKey, fresh bool) (client.KEK, error) {
	if err := ctx.Err(); err != nil {
		return client.KEK{}, fmt.Errorf("KEK %q: %w", key.id, err)
	}
	if kek, outcome, err := c.lookup(key, fresh); outcome != outcomeMiss {
		c.countLookup(outcome)
		return kek, inTrace(ctx, err)
	}
	if !layerbudget.Take(ctx) {
		return client.KEK{}, ErrTooManyKeys
	}
	c.countLookup(outcomeMiss)
	kek, err := c.flights.do(ctx, flightKey{key, fresh}, func() (client.KEK, error) {
		if kek, outcome, err := c.lookup(key, fresh); outcome != outcomeMiss {
			return kek, err
		}
		// The fetch serves every caller, so it must not stop with the first.
		kek, err := c.fetch(context.WithoutCancel(ctx), key.id, key.version)
		if err != nil {
			return c.miss(key, &traced{err, traceid.Of(ctx)}, fresh)
		}
		c.store(key, kek)
		return kek, nil
	})
	return kek, inTrace(ctx, err)
}

func (c *cache) countLookup(outcome string) {
	if c.metrics != nil {
		c.metrics.lookups.WithLabelValues(outcome).Inc()
	}
}

// copyOf returns kek with a key of its own, since the cache clears the keys
// that it drops and callers those that they have used.
func copyOf(kek client.KEK) client.KEK {
	kek.Key = slices.Clone(kek.Key)
	return kek
}

// lookup returns a copy of what is known of a KEK, unless it has to be fresh, or
// how fetching it failed just now. The outcome is outcomeMiss if the broker has to be
// asked.
func (c *cache) lookup(key cacheKey, fresh bool) (_ client.KEK, outcome string, _ error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	if f := c.notExported[key.id]; f.spares(c.notExportedTTL(), now) {
		return client.KEK{}, outcomeNotExported, f.err
	}
	f := c.failed[key]
	if el := c.find(key, now); el != nil && !fresh {
		if !c.stale(el, key, now) {
			return c.use(el, now), outcomeHit, nil
		}
		if f.isOutage() && f.spares(outageTTL, now) {
			return c.use(el, now), outcomeStale, nil
		}
	}
	if f.spares(errorTTL, now) {
		return client.KEK{}, outcomeRefused, f.err
	}
	return client.KEK{}, outcomeMiss, nil
}

// find returns the entry of a KEK, if there is one that may be used.
func (c *cache) find(key cacheKey, now time.Time) *list.Element {
	el, ok := c.entries[key]
	if key.version == 0 {
		el, ok = c.current[key.id]
	}
	switch {
	case !ok:
		return nil
	case c.expired(el.Value.(*cacheEntry), now):
		c.remove(el)
		return nil
	case key.version == 0 && c.past(el.Value.(*cacheEntry).isCurrent, c.grace, now):
		delete(c.current, key.id) // another may be current by now
		return nil
	}
	return el
}

func (c *cache) use(el *list.Element, now time.Time) client.KEK {
	e := el.Value.(*cacheEntry)
	e.used = now
	c.recent.MoveToFront(el)
	return copyOf(e.kek)
}

// stale reports whether the broker has to be asked, if it answers, before the
// entry of a KEK is used.
func (c *cache) stale(el *list.Element, key cacheKey, now time.Time) bool {
	return c.overdue(el, key, now) || key.version == 0 && el.Value.(*cacheEntry).doubted
}

// overdue reports whether the ttl is over for the entry of a KEK.
func (c *cache) overdue(el *list.Element, key cacheKey, now time.Time) bool {
	e := el.Value.(*cacheEntry)
	return c.past(e.fetched, 0, now) || key.version == 0 && c.past(e.isCurrent, 0, now)
}

// past reports whether the ttl is over for what was fetched at some time, and
// more after it.
func (c *cache) past(fetched time.Time, more time.Duration, now time.Time) bool {
	return c.ttl > 0 && now.Sub(fetched) >= c.ttl+more
}

func (c *cache) expired(e *cacheEntry, now time.Time) bool {
	return c.past(e.fetched, c.grace, now) || c.idle > 0 && now.Sub(e.used) >= c.idle
}

func (c *cache) notExportedTTL() time.Duration {
	if c.ttl > 0 {
		return c.ttl
	}
	return notExportedTTL
}

// doubtCurrent makes the next get of a KEK's current version ask which that is, and
// reports whether that can change anything: not right after it was asked. During an
// outage the known version stays valid, or an annotation could take it away from the
// layers of others.
func (c *cache) doubtCurrent(id string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	el, ok := c.current[id]
	now := c.now()
	if f := c.failed[cacheKey{id, 0}]; !ok || now.Sub(el.Value.(*cacheEntry).isCurrent) < errorTTL || f.isOutage() && f.spares(outageTTL, now) {
		return false
	}
	el.Value.(*cacheEntry).doubted = true
	return true
}

// store keeps a KEK that was fetched.
func (c *cache) store(key cacheKey, kek client.KEK) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	delete(c.failed, key)
	delete(c.notExported, key.id)
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
		delete(c.failed, e.key)
	}
	current := key.version == 0
	if current {
		e.isCurrent = now
	}
	if el, ok := c.entries[e.key]; ok {
		if old := el.Value.(*cacheEntry); !current {
			current = c.current[key.id] == el // as far as we know
			e.isCurrent, e.doubted = old.isCurrent, old.doubted
		}
		c.remove(el)
	}
	el := c.recent.PushFront(e)
	c.count(1)
	c.entries[e.key] = el
	if current {
		c.current[key.id] = el
	}
	for c.recent.Len() > c.size {
		c.remove(c.recent.Back())
	}
}

// miss remembers that a KEK could not be fetched, and returns the error or, if
// the broker gave no usable answer, the KEK as it was known, unless it has to be
// fresh.
func (c *cache) miss(key cacheKey, err error, fresh bool) (client.KEK, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	if errors.Is(err, client.ErrNotExported) {
		remember(&c.notExported, key.id, failure{err, now})
		c.removeAll(key.id)
		return client.KEK{}, err
	}
	remember(&c.failed, key, failure{err, now})
	switch {
	case errors.Is(err, client.ErrUnavailable):
		el := c.find(key, now)
		if el == nil || fresh {
			break
		}
		if e := el.Value.(*cacheEntry); !e.warned && c.overdue(el, key, now) {
			e.warned = true
			logrus.WithError(err).WithFields(logrus.Fields{"kek": key.id, "version": e.kek.Version, "age": now.Sub(e.fetched)}).
				Warn("KEK used past its kek-cache-ttl")
		}
		return c.use(el, now), nil
	case errors.Is(err, client.ErrNotFound) && key.version != 0:
		if el, ok := c.entries[key]; ok {
			c.remove(el)
		}
	case errors.Is(err, client.ErrNotFound), errors.Is(err, client.ErrForbidden):
		c.removeAll(key.id) // nor may an outage bring the other versions back
	}
	return client.KEK{}, err
}

// refuse remembers that the broker does not unwrap with a KEK for us.
func (c *cache) refuse(key cacheKey, err error, trace string) {
	if !errors.Is(err, client.ErrForbidden) && !errors.Is(err, client.ErrNotFound) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	remember(&c.refused, key, failure{&traced{err, trace}, c.now()})
}

// refusal returns the refusal that was noted just now, or nil.
func (c *cache) refusal(key cacheKey) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.refused[key]; f.spares(errorTTL, c.now()) {
		return f.err
	}
	return nil
}

// has reports whether a version of a KEK is in memory.
func (c *cache) has(id string, version int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.entries[cacheKey{id, version}]
	return ok
}

// remember notes a failure, and forgets all if there are too many.
func remember[K comparable](m *map[K]failure, key K, f failure) {
	if len(*m) >= maxErrors || *m == nil {
		*m = make(map[K]failure)
	}
	(*m)[key] = f
}

// sweep forgets what has expired, so that no unused KEK stays in memory.
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
	maps.DeleteFunc(c.failed, func(_ cacheKey, f failure) bool {
		return !f.spares(errorTTL, now) && !(f.isOutage() && f.spares(outageTTL, now))
	})
	maps.DeleteFunc(c.refused, func(_ cacheKey, f failure) bool { return !f.spares(errorTTL, now) })
	maps.DeleteFunc(c.notExported, func(_ string, f failure) bool { return !f.spares(c.notExportedTTL(), now) })
}

// removeAll removes all versions of a KEK.
func (c *cache) removeAll(id string) {
	for key, el := range c.entries {
		if key.id == id {
			c.remove(el)
		}
	}
}

func (c *cache) remove(el *list.Element) {
	e := c.recent.Remove(el).(*cacheEntry)
	delete(c.entries, e.key)
	if c.current[e.key.id] == el {
		delete(c.current, e.key.id)
	}
	clear(e.kek.Key)
	if e.private != nil {
		e.private.Clear()
		e.private = nil
	}
	c.count(-1)
}

func (c *cache) count(n float64) {
	if c.metrics != nil {
		c.metrics.cached.Add(n)
	}
}

// clear forgets all KEKs, and keeps none that are still being fetched.
func (c *cache) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.size = 0
	for el := c.recent.Front(); el != nil; el = c.recent.Front() {
		c.remove(el)
	}
}

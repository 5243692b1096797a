package mirror

import (
	"cmp"
	"container/list"
	"context"
	"math"
	"slices"
	"sync"
	"time"
)

const (
	// turnTimeout is how long a request waits for its turn.
	turnTimeout = time.Minute
	// checkInterval is how often slow work is looked for while other work waits.
	checkInterval = time.Second
	// crowdedStall is how long a caller may take for one buffer while others wait.
	crowdedStall = 5 * time.Second
)

// turns bound how much work of one kind is done at once: in all, and for one registry, so
// that a slow registry does not hold up the others. While work waits, work that is too slow
// loses its turn.
type turns struct {
	most         int
	registryMost int
	// patience is how long work may be slow, and rate how many bytes it must move in a
	// second to not be. Without a rate, all work that takes longer than patience is slow.
	patience time.Duration
	rate     float64

	mu      sync.Mutex
	held    map[*work]bool
	count   map[string]int // of those, by registry
	waiting list.List      // of *waiter, in their order
	checked time.Time
}

// work is what needs a turn. It may only be given to one enter.
type work struct {
	registry string
	// moved returns how many bytes the work has moved. May be nil.
	moved func() int64
	// stalled returns for how long it has waited for its caller. May be nil.
	stalled func() time.Duration
	// end ends the work early. It does not wait.
	end func()

	ended  bool
	since  time.Time // when it had moved as much as before
	before int64
}

type waiter struct {
	*work
	ready chan struct{} // closed when it has its turn
}

// enter waits for the turn of w. The caller must call leave.
func (t *turns) enter(ctx context.Context, w *work) (leave func(), err error) {
	within, cancel := context.WithTimeoutCause(ctx, turnTimeout, errBusy)
	defer cancel()
	t.mu.Lock()
	me := &waiter{w, make(chan struct{})}
	at := t.waiting.PushBack(me)
	t.grant()
	t.mu.Unlock()
	tick := time.NewTicker(checkInterval)
	defer tick.Stop()
	for {
		select {
		case <-me.ready:
			return func() { t.leave(w) }, nil
		case <-tick.C:
			t.check()
		case <-within.Done():
			t.mu.Lock()
			defer t.mu.Unlock()
			if t.held[w] { // meanwhile
				t.free(w)
			} else {
				t.waiting.Remove(at)
			}
			return nil, context.Cause(within)
		}
	}
}

// do does work for a registry, with a turn and a context that ends when the work loses it.
func (t *turns) do(ctx context.Context, registry string, f func(context.Context) error) error {
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	leave, err := t.enter(ctx, &work{registry: registry, end: func() { end(errSlow) }})
	if err != nil {
		return err
	}
	defer leave()
	err = f(ctx)
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

func (t *turns) leave(w *work) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.free(w)
}

func (t *turns) free(w *work) {
	delete(t.held, w)
	if t.count[w.registry]--; t.count[w.registry] == 0 {
		delete(t.count, w.registry)
	}
	t.grant()
}

// grant gives turns to those who wait, in their order, except that a registry with as many
// as it may have lets others pass.
func (t *turns) grant() {
	if t.held == nil {
		t.held, t.count = map[*work]bool{}, map[string]int{}
	}
	for at := t.waiting.Front(); at != nil && len(t.held) < t.most; {
		w := at.Value.(*waiter)
		next := at.Next()
		if t.count[w.registry] < t.registryMost {
			t.waiting.Remove(at)
			t.held[w.work] = true
			t.count[w.registry]++
			w.since, w.before = time.Now(), 0
			close(w.ready)
		}
		at = next
	}
}

// check ends work that is too slow, the slowest first, if other work could have its turn.
func (t *turns) check() {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if now.Sub(t.checked) < checkInterval/2 {
		return // another one has
	}
	t.checked = now
	type slow struct {
		*work
		rate float64
	}
	var all []slow
	for w := range t.held {
		if rate, is := t.isSlow(w, now); is {
			all = append(all, slow{w, rate})
		}
	}
	slices.SortFunc(all, func(a, b slow) int { return cmp.Compare(a.rate, b.rate) })
	for at := t.waiting.Front(); at != nil && len(all) > 0; at = at.Next() {
		w := at.Value.(*waiter)
		// One more of a registry that has as many as it may have needs one of its own.
		full := t.count[w.registry] >= t.registryMost
		i := slices.IndexFunc(all, func(s slow) bool { return !full || s.registry == w.registry })
		if i < 0 {
			continue
		}
		if !all[i].ended {
			all[i].ended = true
			all[i].end()
		}
		all = slices.Delete(all, i, i+1)
	}
}

// isSlow reports whether work is too slow while other work waits, and how many bytes it
// moves in a second.
func (t *turns) isSlow(w *work, now time.Time) (rate float64, is bool) {
	if w.ended {
		return math.Inf(-1), true // its turn is about to be free
	}
	if w.stalled != nil && w.stalled() > crowdedStall {
		return 0, true
	}
	took := now.Sub(w.since)
	if took < t.patience {
		return 0, false
	}
	if t.rate == 0 {
		return -took.Seconds(), true // the one that has taken longest
	}
	moved := w.moved()
	rate = float64(moved-w.before) / took.Seconds()
	if rate >= t.rate {
		w.since, w.before = now, moved
	}
	return rate, rate < t.rate
}

// streams are the turns of blobs that are sent.
type streams struct{ turns }

const (
	// streamPatience is how long a blob may come or go slowly while others wait, and
	// streamRate the bytes in a second that are not slow.
	streamPatience = 10 * time.Second
	streamRate     = 32 << 10
)

func newStreams(most int) *streams {
	return &streams{turns{most: most, registryMost: most - most/8, patience: streamPatience, rate: streamRate}}
}

// enter waits for the turn of an answer. The caller must call leave.
func (s *streams) enter(ctx context.Context, w *answer) (leave func(), err error) {
	return s.turns.enter(ctx, w.work())
}

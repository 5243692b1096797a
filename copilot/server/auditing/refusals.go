package auditing

import (
	"container/list"
	"context"
	"crypto/sha256"
	"fmt"
	"hash/maphash"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/time/rate"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/server/caller"
)

// How many lines of the audit log refused requests get. The first of each kind gets a
// line. Of a caller's others, refusalBurst do, and one more each refusalInterval: enough
// for a node that can't decrypt an image and retries now and then. The rest are summed
// up.
const (
	refusalBurst    = 60
	refusalInterval = 10 * time.Second
	// maxKinds is how many kinds of refusals are counted separately, of all callers, and
	// maxCallerKinds of one. Beyond that, each action and status is one kind, of which up to
	// maxKEKs KEKs are counted.
	maxKinds       = 4096
	maxCallerKinds = 128
	maxKEKs        = 1024
	// burstEnd is how long after its last refusal a burst is over. A burst that goes on
	// is summed up each sumInterval, if the caller has a line left, or else after
	// maxSumDelay.
	burstEnd    = 10 * time.Second
	sumInterval = time.Minute
	maxSumDelay = time.Hour
	// kindTTL is after how long a kind is forgotten: the next refusal is the first again.
	kindTTL = time.Hour
	// lookInterval is how often sums that are due are looked for.
	lookInterval = 2 * time.Second
)

// refusals sums up refused requests, whose lines could fill the disk. It is safe for
// concurrent use.
type refusals struct {
	write func(audit.Entry) error

	mu      sync.Mutex
	callers map[string]*refusedCaller
	kinds   map[kindID]*list.Element
	recent  list.List // of *kind, the most recent first
	evicted []*kind   // before they were summed up
}

type kindID [sha256.Size]byte

type refusedCaller struct {
	lines *rate.Limiter
	kinds int
}

// kind is refusals of one caller that have the same cause.
type kind struct {
	id     kindID
	caller string
	coarse bool // causes differ
	last   audit.Entry
	at     time.Time // of last
	since  time.Time // of the first without a line
	count  int64     // of those without a line
	// keks are the hashes of the KEKs that those were for, if causes differ.
	keks map[uint64]bool
}

var kekSeed = maphash.MakeSeed()

// note counts a refused request of a caller, and reports whether it gets a line of its
// own. If many is true, only the first of its kind does.
func (r *refusals) note(who string, e audit.Entry, many bool) bool {
	e.Time = time.Now().UTC()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.callers == nil {
		r.callers, r.kinds = make(map[string]*refusedCaller), make(map[kindID]*list.Element)
	}
	c, ok := r.callers[who]
	if !ok {
		c = &refusedCaller{lines: rate.NewLimiter(rate.Every(refusalInterval), refusalBurst)}
		r.callers[who] = c
	}
	coarse := many
	id := idOf(who, e.Action, fmt.Sprint(e.Status), e.KEK, e.Workload, e.Reason, caller.Address(e.From))
	if many {
		id = idOf(who, fmt.Sprint(e.Status))
	} else if r.kinds[id] == nil && c.kinds >= maxCallerKinds {
		id, coarse = idOf(who, e.Action, fmt.Sprint(e.Status)), true
	}
	el, ok := r.kinds[id]
	if !ok {
		k := &kind{id: id, caller: who, coarse: coarse, at: e.Time}
		r.kinds[id] = r.recent.PushFront(k)
		c.kinds++
		c.lines.Allow()
		if r.recent.Len() > maxKinds {
			r.forget(r.recent.Back())
		}
		return true
	}
	r.recent.MoveToFront(el)
	k := el.Value.(*kind)
	k.at = e.Time
	if k.count == 0 && !many && c.lines.Allow() {
		return true
	}
	if k.count == 0 {
		k.since, k.keks = e.Time, nil
	}
	k.count++
	if k.coarse && e.KEK != "" && len(k.keks) < maxKEKs {
		if k.keks == nil {
			k.keks = make(map[uint64]bool)
		}
		k.keks[maphash.String(kekSeed, e.KEK)] = true
	}
	k.last = e.Shown()
	return false
}

func idOf(parts ...string) kindID {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d %s ", len(p), p)
	}
	return kindID(h.Sum(nil))
}

// forget forgets a kind. Its refusals without a line are summed up later.
func (r *refusals) forget(el *list.Element) {
	k := r.recent.Remove(el).(*kind)
	delete(r.kinds, k.id)
	if k.count > 0 {
		r.evicted = append(r.evicted, k)
	}
	if c := r.callers[k.caller]; c != nil {
		if c.kinds--; c.kinds == 0 {
			delete(r.callers, k.caller)
		}
	}
}

// sum returns a line that sums up a kind's refusals since its last line, and starts
// counting again.
func (k *kind) sum() audit.Entry {
	e := k.last
	e.Count, e.Since = k.count, k.since
	times, of := "times", ""
	if k.count == 1 {
		times = "time"
	}
	if k.coarse {
		switch n := len(k.keks); {
		case n >= maxKEKs:
			of = fmt.Sprintf(", for %d or more different KEKs", n)
		case n > 1:
			of = fmt.Sprintf(", for %d different KEKs", n)
		}
		of += ", this one the last of several kinds"
	}
	e.Reason += fmt.Sprintf(" (%s %d more %s from %s to %s%s)", e.Verdict, k.count, times, k.since.Format(time.RFC3339), k.at.Format(time.RFC3339), of)
	k.count = 0
	return e
}

// look writes the sums that are due now, or all of them.
func (r *refusals) look(now time.Time, all bool) {
	r.mu.Lock()
	sums := r.evicted
	r.evicted = nil
	for el := r.recent.Back(); el != nil; {
		previous := el.Prev()
		k := el.Value.(*kind)
		switch waited := now.Sub(k.since); {
		case k.count == 0 && now.Sub(k.at) >= kindTTL:
			r.forget(el)
		case k.count == 0:
		case all, waited >= maxSumDelay, (waited >= sumInterval || now.Sub(k.at) >= burstEnd) && r.callers[k.caller].lines.Allow():
			sums = append(sums, k)
		}
		el = previous
	}
	lines := make([]audit.Entry, len(sums))
	for i, k := range sums {
		lines[i] = k.sum()
	}
	r.mu.Unlock()
	for i, e := range lines {
		if err := r.write(e); err != nil {
			logrus.WithError(err).Error("can't audit refused requests: they are summed up later")
			r.restore(sums[i:], lines[i:])
			return
		}
	}
}

// restore takes back sums that could not be written.
func (r *refusals) restore(sums []*kind, lines []audit.Entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, k := range sums {
		k.count, k.since = k.count+lines[i].Count, lines[i].Since
		if r.kinds[k.id] == nil {
			r.evicted = append(r.evicted, k)
		}
	}
}

// run writes sums that are due, until ctx is done.
func (r *refusals) run(ctx context.Context) {
	tick := time.NewTicker(lookInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			r.look(now, false)
		}
	}
}

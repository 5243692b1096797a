package server

import (
	"container/list"
	"context"
	"crypto/sha256"
	"fmt"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/time/rate"

	"github.com/ctrlplane/pilot/copilot/audit"
)

// How many lines of the audit log refused requests make. The first of each kind has a
// line. Of a caller's others, refusalBurst have, and one more each refusalInterval:
// those of a node that can't decrypt an image and tries again now and then. The rest
// are summed up.
const (
	refusalBurst    = 60
	refusalInterval = 10 * time.Second
	// maxKinds is how many kinds of refusals are counted separately, of all callers, and
	// maxCallerKinds of one: more are one kind for each action and status.
	maxKinds       = 4096
	maxCallerKinds = 128
	// burstEnd is for how long nothing was refused when a burst is over, and sumEvery
	// how often one that goes on is summed up, if the caller has a line left.
	// sumLatest is when it is if not.
	burstEnd  = 10 * time.Second
	sumEvery  = time.Minute
	sumLatest = time.Hour
	// forgetAfter is when a kind is forgotten, and what follows is the first again.
	forgetAfter = time.Hour
	// lookInterval is how often that is looked at.
	lookInterval = 2 * time.Second
)

// refusals sums up refused requests, which would fill the disk with lines of the
// audit log. It is safe for concurrent use.
type refusals struct {
	write func(audit.Entry) error

	mu      sync.Mutex
	callers map[string]*refusedCaller
	kinds   map[kindID]*list.Element
	recent  list.List // of *kind, the most recent first
	left    []*kind   // that were forgotten before they were summed up
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
	since  time.Time // of the first that is not written down
	count  int64     // of those
}

// note notes a refused request of a caller, and reports whether it gets a line of its
// own. One of those that are always many, such as those of who sends too many, gets one
// as the first of them only.
func (r *refusals) note(caller string, e audit.Entry, many bool) bool {
	e.Time = time.Now().UTC()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.callers == nil {
		r.callers, r.kinds = make(map[string]*refusedCaller), make(map[kindID]*list.Element)
	}
	c, ok := r.callers[caller]
	if !ok {
		c = &refusedCaller{lines: rate.NewLimiter(rate.Every(refusalInterval), refusalBurst)}
		r.callers[caller] = c
	}
	coarse := many
	id := idOf(caller, e.Action, fmt.Sprint(e.Status), e.KEK, e.Reason, source(e.From))
	if many {
		id = idOf(caller, fmt.Sprint(e.Status))
	} else if r.kinds[id] == nil && c.kinds >= maxCallerKinds {
		id, coarse = idOf(caller, e.Action, fmt.Sprint(e.Status)), true
	}
	el, ok := r.kinds[id]
	if !ok {
		k := &kind{id: id, caller: caller, coarse: coarse, at: e.Time}
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
		k.since = e.Time
	}
	k.count++
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

// forget forgets a kind, which is summed up if it has to be.
func (r *refusals) forget(el *list.Element) {
	k := r.recent.Remove(el).(*kind)
	delete(r.kinds, k.id)
	if k.count > 0 {
		r.left = append(r.left, k)
	}
	if c := r.callers[k.caller]; c != nil {
		if c.kinds--; c.kinds == 0 {
			delete(r.callers, k.caller)
		}
	}
}

// sum returns a line that sums up what a kind has since the last line, and begins
// again.
func (k *kind) sum() audit.Entry {
	e := k.last
	e.Count, e.Since = k.count, k.since
	times, of := "times", ""
	if k.count == 1 {
		times = "time"
	}
	if k.coarse {
		of = ", this one the last of several kinds"
	}
	e.Reason += fmt.Sprintf(" (%s %d more %s from %s to %s%s)", e.Verdict, k.count, times, k.since.Format(time.RFC3339), k.at.Format(time.RFC3339), of)
	k.count = 0
	return e
}

// look writes the sums that are due at the time now, or all.
func (r *refusals) look(now time.Time, all bool) {
	r.mu.Lock()
	sums := r.left
	r.left = nil
	for el := r.recent.Back(); el != nil; {
		previous := el.Prev()
		k := el.Value.(*kind)
		switch waited := now.Sub(k.since); {
		case k.count == 0 && now.Sub(k.at) >= forgetAfter:
			r.forget(el)
		case k.count == 0:
		case all, waited >= sumLatest, (waited >= sumEvery || now.Sub(k.at) >= burstEnd) && r.callers[k.caller].lines.Allow():
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
			logrus.WithError(err).Error("refused requests not audited: they are summed up later")
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
			r.left = append(r.left, k)
		}
	}
}

// run sums up until ctx is done.
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

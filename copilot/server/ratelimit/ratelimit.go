package server

import (
	"container/list"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/ctrlplane/pilot/copilot/policy"
)

// maxCallers is how many identities are counted separately; those that were not
// heard of for longest are forgotten, and begin anew.
const maxCallers = 16384

// limits bounds how often each identity may ask. It is safe for concurrent use.
type limits struct {
	mu     sync.Mutex
	by     map[string]*list.Element
	recent list.List // of *caller, the most recent first
}

type caller struct {
	who    string
	bucket *rate.Limiter
	policy *policy.Policy // that bucket was made by
}

// take takes one request of who's, and returns 0, or how long to wait.
func (l *limits) take(who string, p *policy.Policy) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.caller(who)
	if c.policy != p {
		perSecond, burst := p.Limit(who)
		if c.bucket == nil || float64(c.bucket.Limit()) != perSecond || c.bucket.Burst() != burst {
			c.bucket = rate.NewLimiter(rate.Limit(perSecond), burst)
		}
		c.policy = p
	}
	return c.take()
}

// take takes one request, and returns 0, or how long to wait.
func (c *caller) take() time.Duration {
	r := c.bucket.Reserve()
	if after := r.Delay(); after > 0 {
		r.Cancel()
		return after
	}
	return 0
}

// takeAt is take with a rate of its own. A limits has either callers with rates of
// their own or those with the policy's.
func (l *limits) takeAt(who string, perSecond float64, burst int) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.caller(who)
	if c.bucket == nil {
		c.bucket = rate.NewLimiter(rate.Limit(perSecond), burst)
	}
	return c.take()
}

// exhausted returns how long to wait where who has no request left, and 0 where it
// has, which it leaves there.
func (l *limits) exhausted(who string) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	el, ok := l.by[who]
	if !ok {
		return 0
	}
	bucket := el.Value.(*caller).bucket
	if bucket == nil || bucket.Tokens() >= 1 {
		return 0
	}
	return time.Duration((1 - bucket.Tokens()) / float64(bucket.Limit()) * float64(time.Second))
}

func (l *limits) caller(who string) *caller {
	if el, ok := l.by[who]; ok {
		l.recent.MoveToFront(el)
		return el.Value.(*caller)
	}
	if l.by == nil {
		l.by = make(map[string]*list.Element)
	}
	c := &caller{who: who}
	l.by[who] = l.recent.PushFront(c)
	if l.recent.Len() > maxCallers {
		delete(l.by, l.recent.Remove(l.recent.Back()).(*caller).who)
	}
	return c
}

// Package ratelimit bounds how often each caller may send requests, and how many
// connections each may have open.
package ratelimit

import (
	"container/list"
	"fmt"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/ctrlplane/pilot/copilot/policy"
)

// maxCallers is how many callers are counted separately. Those that have been silent
// for longest are forgotten, and begin again.
const maxCallers = 16384

// Exceeded is the error of a request, or of a connection, that is over its limit.
type Exceeded struct {
	// RetryAfter is how long the caller should wait.
	RetryAfter time.Duration
	// Connections is how many the caller has open, if there are too many of those.
	Connections int
}

func (e *Exceeded) Error() string {
	if e.Connections > 0 {
		return fmt.Sprintf("too many connections: %d are open, which is the limit: use one for several requests, or set connections in a limit of the policy", e.Connections)
	}
	return fmt.Sprintf("too many requests: try again in %s", e.RetryAfter.Round(time.Millisecond))
}

// Requests bounds how often each caller may send requests. The zero value is ready to
// use, and safe for concurrent use.
type Requests struct {
	mu     sync.Mutex
	by     map[string]*list.Element
	recent list.List // of *bucket, the most recent first
}

type bucket struct {
	who    string
	tokens *rate.Limiter
	policy *policy.Policy // that tokens was made by
}

// Take counts a request against a caller's limit in the policy. The error is an
// [*Exceeded].
func (l *Requests) Take(who string, p *policy.Policy) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.bucket(who)
	if b.policy != p {
		perSecond, burst := p.Limit(who)
		if b.tokens == nil || float64(b.tokens.Limit()) != perSecond || b.tokens.Burst() != burst {
			b.tokens = rate.NewLimiter(rate.Limit(perSecond), burst)
		}
		b.policy = p
	}
	return b.take()
}

// TakeAt is [Requests.Take] with a given limit. All calls for one Requests are either
// Take or TakeAt.
func (l *Requests) TakeAt(who string, perSecond float64, burst int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.bucket(who)
	if b.tokens == nil {
		b.tokens = rate.NewLimiter(rate.Limit(perSecond), burst)
	}
	return b.take()
}

func (b *bucket) take() error {
	r := b.tokens.Reserve()
	if after := r.Delay(); after > 0 {
		r.Cancel()
		return &Exceeded{RetryAfter: after}
	}
	return nil
}

// Check returns the error of [Requests.Take] for a caller that has no request left,
// without counting one.
func (l *Requests) Check(who string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	el, ok := l.by[who]
	if !ok {
		return nil
	}
	tokens := el.Value.(*bucket).tokens
	if tokens == nil || tokens.Tokens() >= 1 {
		return nil
	}
	return &Exceeded{RetryAfter: time.Duration((1 - tokens.Tokens()) / float64(tokens.Limit()) * float64(time.Second))}
}

func (l *Requests) bucket(who string) *bucket {
	if el, ok := l.by[who]; ok {
		l.recent.MoveToFront(el)
		return el.Value.(*bucket)
	}
	if l.by == nil {
		l.by = make(map[string]*list.Element)
	}
	b := &bucket{who: who}
	l.by[who] = l.recent.PushFront(b)
	if l.recent.Len() > maxCallers {
		delete(l.by, l.recent.Remove(l.recent.Back()).(*bucket).who)
	}
	return b
}

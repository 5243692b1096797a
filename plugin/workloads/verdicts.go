package workloads

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/plugin/imagekeys"
)

const (
	// refusalTTL is how long a refusal is remembered, if verdicts are not kept shorter.
	refusalTTL = 2 * time.Second
	// outageTTL is how long no broker is asked the same again after none has answered.
	// containerd creates one container at a time, so each that waits holds up all others.
	outageTTL = 5 * time.Second
	// outageWait is how long a container waits for an answer shortly after an outage.
	outageWait = 100 * time.Millisecond
	// maxVerdicts bounds how many verdicts are remembered.
	maxVerdicts = 4096
)

// errNoAnswerYet: the broker was asked, and may still answer.
var errNoAnswerYet = errors.New("the broker has not answered yet")

// question is whether a workload may use a KEK.
type question struct {
	kek      imagekeys.KEK
	workload string
}

// verdicts remembers the broker's answers. It is safe for concurrent use.
type verdicts struct {
	ask func(context.Context, question) error
	now func() time.Time

	mu     sync.Mutex
	known  map[question]*verdict
	outage time.Time // when no broker has answered last
}

// verdict is what is known about a question.
type verdict struct {
	allowed time.Time // when the broker has allowed it last, unless it has refused since
	err     error     // the last answer, or why there was none
	at      time.Time // of err
	warned  bool      // that the permission is used past its ttl
	asked   time.Time
	asking  chan struct{} // closed with the answer; nil: nobody asks now
}

// permits reports whether a permission is younger than d.
func (v *verdict) permits(d time.Duration, now time.Time) bool {
	return !v.allowed.IsZero() && now.Sub(v.allowed) < d
}

// knownAllowed reports whether the broker has allowed q within the last ttl.
func (v *verdicts) knownAllowed(q question, ttl time.Duration) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	e := v.known[q]
	return e != nil && e.permits(ttl, v.now())
}

// allowed returns nil if the broker allows q, or has allowed it within the last ttl, or
// within grace after that and gives no usable answer now. It waits until ctx is done at
// most, and shorter in an outage. Concurrent callers share one request, which goes on after
// they have given up.
func (v *verdicts) allowed(ctx context.Context, q question, ttl, grace time.Duration) error {
	v.mu.Lock()
	now := v.now()
	e := v.entry(q, now, ttl+grace)
	switch {
	case e.permits(ttl, now):
		v.mu.Unlock()
		return nil
	case e.err != nil && !isOutage(e.err) && now.Sub(e.at) < min(refusalTTL, ttl):
		defer v.mu.Unlock()
		return e.err
	case isOutage(e.err) && now.Sub(e.at) < outageTTL && e.asking == nil:
		defer v.mu.Unlock()
		return v.inOutage(q, e, e.err, ttl+grace)
	}
	if e.asking == nil {
		e.asking, e.asked = make(chan struct{}), now
		// The request serves every caller, so it must not stop with the first.
		go v.fetch(context.WithoutCancel(ctx), q, e)
	}
	asking := e.asking
	if now.Sub(v.outage) < outageTTL || now.Sub(e.asked) > outageWait {
		// The broker is slow or away, and others wait.
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, outageWait)
		defer cancel()
	}
	v.mu.Unlock()

	select {
	case <-asking:
	case <-ctx.Done():
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	select {
	case <-asking:
		if e.err == nil || !isOutage(e.err) {
			return e.err
		}
		return v.inOutage(q, e, e.err, ttl+grace)
	default:
		v.outage = v.now()
		return v.inOutage(q, e, fmt.Errorf("KEK %q for workload %s: %w: the kubelet tries again", q.kek.ID, q.workload, errNoAnswerYet), ttl+grace)
	}
}

// inOutage returns err, unless the broker has allowed q within the last d.
func (v *verdicts) inOutage(q question, e *verdict, err error, d time.Duration) error {
	if !e.permits(d, v.now()) {
		return err
	}
	if !e.warned {
		e.warned = true
		logrus.WithError(err).WithFields(logrus.Fields{"kek": q.kek.ID, "workload": q.workload, "age": v.now().Sub(e.allowed)}).
			Warn("earlier permission used: no broker answers")
	}
	return nil
}

// fetch asks the broker and notes its answer.
func (v *verdicts) fetch(ctx context.Context, q question, e *verdict) {
	err := v.ask(ctx, q)
	v.mu.Lock()
	defer v.mu.Unlock()
	e.err, e.at = err, v.now()
	switch {
	case err == nil:
		e.allowed, e.warned, v.outage = e.asked, false, time.Time{}
	case errors.Is(err, client.ErrUnavailable):
		v.outage = e.at
	default:
		// Nor may an outage bring the permission back.
		e.allowed = time.Time{}
	}
	close(e.asking)
	e.asking = nil
}

// entry returns what is known about q. The caller holds the lock.
func (v *verdicts) entry(q question, now time.Time, keep time.Duration) *verdict {
	if e := v.known[q]; e != nil {
		return e
	}
	if len(v.known) >= maxVerdicts {
		for old, e := range v.known {
			if e.asking == nil && !e.permits(keep, now) {
				delete(v.known, old)
			}
		}
	}
	if v.known == nil || len(v.known) >= maxVerdicts {
		v.known = map[question]*verdict{}
	}
	e := &verdict{}
	v.known[q] = e
	return e
}

// forget drops all verdicts, and those that are still being asked for.
func (v *verdicts) forget() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.known, v.outage = nil, time.Time{}
}

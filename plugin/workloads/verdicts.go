package workloads

import (
	"context"
	"crypto/sha256"
	"encoding/json"
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

// use is what the broker is asked: whether a workload, whose pod has these labels, may use a
// KEK. The labels are nil if they are not known.
type use struct {
	kek      imagekeys.KEK
	workload string
	labels   map[string]string
}

// question is what all uses with the same answer have in common: labels are those that the
// answer depends on, by [labelHash].
type question struct {
	kek      imagekeys.KEK
	workload string
	labels   string
}

// verdicts remembers the broker's answers. It is safe for concurrent use.
type verdicts struct {
	// ask returns nil if a use is allowed, and the keys of the labels that this depends on.
	ask func(context.Context, use) (labelKeys []string, err error)
	now func() time.Time

	mu     sync.Mutex
	known  map[question]*verdict
	outage time.Time // when no broker has answered last
	// labelKeys are those of the last permissions, by questions without labels.
	labelKeys map[question][]string
}

// verdict is what is known about a question.
type verdict struct {
	of      question
	allowed time.Time // when the broker has allowed it last, unless it has refused since
	err     error     // the last answer, or why there was none
	at      time.Time // of err
	warned  bool      // that the permission is used past its ttl
	asked   time.Time
	answers question      // that err is the answer to
	asking  chan struct{} // closed with the answer; nil: nobody asks now
}

// permits reports whether a permission is younger than d.
func (v *verdict) permits(d time.Duration, now time.Time) bool {
	return !v.allowed.IsZero() && now.Sub(v.allowed) < d
}

// question returns what a use comes to. Until the broker has named the labels that its answer
// depends on, that is all of them. The caller holds the lock.
func (v *verdicts) question(u use) question {
	q := question{kek: u.kek, workload: u.workload}
	keys, known := v.labelKeys[q]
	if known && len(keys) == 0 {
		return q
	}
	q.labels = labelHash(u.labels, keys, known)
	return q
}

// labelHash returns a hash of labels: of those that have keys, or of all. It differs for
// different keys. Pods may have many labels, and long ones.
func labelHash(labels map[string]string, keys []string, some bool) string {
	var text any = labels
	if some && labels != nil {
		values := make(map[string]*string, len(keys))
		for _, key := range keys {
			values[key] = nil
			if value, ok := labels[key]; ok {
				values[key] = &value
			}
		}
		text = values
	}
	b, err := json.Marshal(text)
	if err != nil {
		panic(err) // of strings
	}
	sum := sha256.Sum256(fmt.Appendf(b, "%t", some))
	return string(sum[:])
}

// knownAllowed reports whether the broker has allowed u within the last ttl.
func (v *verdicts) knownAllowed(u use, ttl time.Duration) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, known := v.labelKeys[question{kek: u.kek, workload: u.workload}]; !known {
		return false // and a layer may name thousands of KEKs
	}
	e := v.known[v.question(u)]
	return e != nil && e.permits(ttl, v.now())
}

// allowed returns nil if the broker allows u, or has allowed it within the last ttl, or
// within grace after that and gives no usable answer now. It waits until ctx is done at
// most, and shorter in an outage. Concurrent callers share one request, which goes on after
// they have given up.
func (v *verdicts) allowed(ctx context.Context, u use, ttl, grace time.Duration) error {
	for range 2 {
		if err, forOthers := v.shared(ctx, u, ttl, grace); !forOthers {
			return err
		}
	}
	return fmt.Errorf("KEK %q for workload %s: %w: the kubelet tries again", u.kek.ID, u.workload, errNoAnswerYet)
}

// shared is allowed, which may wait for the request of another caller. It reports whether
// the answer turned out to be for other labels.
func (v *verdicts) shared(ctx context.Context, u use, ttl, grace time.Duration) (err error, forOthers bool) {
	v.mu.Lock()
	now := v.now()
	q := v.question(u)
	e := v.entry(q, now, ttl+grace)
	switch {
	case e.permits(ttl, now):
		v.mu.Unlock()
		return nil, false
	case e.err != nil && !isOutage(e.err) && now.Sub(e.at) < min(refusalTTL, ttl):
		defer v.mu.Unlock()
		return e.err, false
	case isOutage(e.err) && now.Sub(e.at) < outageTTL && e.asking == nil:
		defer v.mu.Unlock()
		return v.inOutage(q, e, e.err, ttl+grace), false
	}
	if e.asking == nil {
		e.asking, e.asked = make(chan struct{}), now
		// The request serves every caller, so it must not stop with the first.
		go v.fetch(context.WithoutCancel(ctx), u, e, ttl+grace)
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
		if e.answers != v.question(u) {
			return nil, true
		}
		if e.err == nil || !isOutage(e.err) {
			return e.err, false
		}
		return v.inOutage(q, e, e.err, ttl+grace), false
	default:
		v.outage = v.now()
		return v.inOutage(q, e, fmt.Errorf("KEK %q for workload %s: %w: the kubelet tries again", q.kek.ID, q.workload, errNoAnswerYet), ttl+grace), false
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

// fetch asks the broker and notes its answer in e. A permission is noted for the labels that
// the broker says it depends on.
func (v *verdicts) fetch(ctx context.Context, u use, e *verdict, keep time.Duration) {
	labelKeys, err := v.ask(ctx, u)
	v.mu.Lock()
	defer v.mu.Unlock()
	e.err, e.at = err, v.now()
	granted := e
	if err == nil && v.known[e.of] == e { // it was not forgotten meanwhile
		v.note(u, labelKeys)
		granted = v.entry(v.question(u), e.at, keep)
	}
	e.answers = v.question(u)
	switch {
	case err == nil:
		granted.allowed, granted.warned, v.outage = e.asked, false, time.Time{}
	case errors.Is(err, client.ErrUnavailable):
		v.outage = e.at
	default:
		// Nor may an outage bring the permission back.
		e.allowed = time.Time{}
	}
	close(e.asking)
	e.asking = nil
}

// note notes the keys of the labels that a permission depends on. The caller holds the lock.
func (v *verdicts) note(u use, labelKeys []string) {
	if v.labelKeys == nil || len(v.labelKeys) >= maxVerdicts {
		v.labelKeys = map[question][]string{}
	}
	v.labelKeys[question{kek: u.kek, workload: u.workload}] = labelKeys
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
	e := &verdict{of: q}
	v.known[q] = e
	return e
}

// forget drops all verdicts, and those that are still being asked for.
func (v *verdicts) forget() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.known, v.labelKeys, v.outage = nil, nil, time.Time{}
}

package mirror

import (
	"context"
	"sync"
	"time"
)

const (
	// turnTimeout is how long a blob waits for its turn.
	turnTimeout = time.Minute
	// crowdedStall is how long a caller may take for one buffer while others wait.
	crowdedStall = 5 * time.Second
)

// streams are the blobs that are sent now, of which there are only so many. While others
// wait, callers that do not read lose their turn.
type streams struct {
	turns chan struct{}

	mu   sync.Mutex
	sent map[*answer]bool
}

func newStreams(most int) *streams {
	return &streams{turns: make(chan struct{}, most), sent: map[*answer]bool{}}
}

// enter waits for the turn of an answer. The caller must call leave.
func (s *streams) enter(ctx context.Context, w *answer) (leave func(), err error) {
	within, cancel := context.WithTimeoutCause(ctx, turnTimeout, errBusy)
	defer cancel()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case s.turns <- struct{}{}:
			s.mu.Lock()
			defer s.mu.Unlock()
			s.sent[w] = true
			return func() { s.leave(w) }, nil
		case <-tick.C:
			s.endSlowest()
		case <-within.Done():
			return nil, context.Cause(within)
		}
	}
}

func (s *streams) leave(w *answer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sent, w)
	<-s.turns
}

// endSlowest ends the answer whose caller has read nothing for the longest time, if that is
// too long while others wait.
func (s *streams) endSlowest() {
	s.mu.Lock()
	defer s.mu.Unlock()
	var slowest *answer
	longest := crowdedStall
	for w := range s.sent {
		if stalled := w.stalled(); stalled > longest {
			slowest, longest = w, stalled
		}
	}
	if slowest != nil {
		slowest.end()
	}
}

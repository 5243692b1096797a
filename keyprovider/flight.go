package keyprovider

import (
	"context"
	"fmt"
	"sync"

	"github.com/ctrlplane/pilot/copilot/client"
)

// flights lets concurrent callers that want the same KEK share one fetch. Each gets a
// copy, and the key that was fetched is cleared once the last one has it.
type flights struct {
	mu      sync.Mutex
	current map[flightKey]*flight
}

type flightKey struct {
	cacheKey
	fresh bool
}

// flight is a fetch under way.
type flight struct {
	landed  chan struct{} // closed when kek and err are there
	waiting int           // callers that have not taken them yet, nor given up
	kek     client.KEK
	err     error
}

// do returns what fetch returns, to each caller that asks for key before it does. A
// caller stops waiting when its ctx is done; the fetch continues.
func (f *flights) do(ctx context.Context, key flightKey, fetch func() (client.KEK, error)) (client.KEK, error) {
	f.mu.Lock()
	current, ok := f.current[key]
	if !ok {
		current = &flight{landed: make(chan struct{})}
		if f.current == nil {
			f.current = make(map[flightKey]*flight)
		}
		f.current[key] = current
		go f.fly(key, current, fetch)
	}
	current.waiting++
	f.mu.Unlock()

	select {
	case <-current.landed:
		defer f.leave(current)
		return copyOf(current.kek), current.err
	case <-ctx.Done():
		f.leave(current)
		return client.KEK{}, fmt.Errorf("KEK %q: %w", key.id, ctx.Err())
	}
}

func (f *flights) fly(key flightKey, current *flight, fetch func() (client.KEK, error)) {
	kek, err := fetch()
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.current, key)
	current.kek, current.err = kek, err
	if current.waiting == 0 {
		clear(kek.Key)
	}
	close(current.landed)
}

// leave notes that a caller needs the flight no more.
func (f *flights) leave(current *flight) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if current.waiting--; current.waiting > 0 {
		return
	}
	select {
	case <-current.landed:
		clear(current.kek.Key)
	default: // another caller may still join
	}
}

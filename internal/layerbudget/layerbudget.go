// Package layerbudget limits the broker calls for one layer, however many wrapped keys
// the layer claims to have.
package layerbudget

import (
	"cmp"
	"container/list"
	"context"
	"crypto/rand"
	"sync"
	"sync/atomic"
)

// Calls is the limit for one layer. It is enough for 64 recipients, the most that a
// layer can have, in any order: two calls each, of which the first learns that the KEK
// is not exported.
const Calls = 128

// Header is the gRPC header that identifies the calls for one layer.
const Header = "pilot-layer"

// maxLayers is how many layers of other processes are counted separately.
const maxLayers = 1024

type key struct{}

// Budget is what is left for one layer. It is safe for concurrent use.
type Budget struct {
	id   string // made when it is needed
	once sync.Once
	used atomic.Int64
}

// With returns a context with a budget for one layer: ctx if it has one.
func With(ctx context.Context) context.Context {
	if of(ctx) != nil {
		return ctx
	}
	return context.WithValue(ctx, key{}, new(Budget))
}

func of(ctx context.Context) *Budget {
	b, _ := ctx.Value(key{}).(*Budget)
	return b
}

// ID returns the value of [Header] for the context's layer, or "".
func ID(ctx context.Context) string {
	b := of(ctx)
	if b == nil {
		return ""
	}
	b.once.Do(func() { b.id = cmp.Or(b.id, rand.Text()) })
	return b.id
}

// Take reports whether one more call for the context's layer is allowed, and counts it.
// Without a budget, every call is.
func Take(ctx context.Context) bool {
	b := of(ctx)
	return b == nil || b.used.Add(1) <= Calls
}

// Taken returns how many calls for the context's layer were allowed.
func Taken(ctx context.Context) int {
	if b := of(ctx); b != nil {
		return int(min(b.used.Load(), Calls))
	}
	return 0
}

// Layers are the budgets of other processes' layers, by ID. It is safe for concurrent
// use.
type Layers struct {
	mu     sync.Mutex
	by     map[string]*list.Element
	recent list.List // of *Budget, the most recent first
}

// With returns a context with the budget of the layer that is called id.
func (l *Layers) With(ctx context.Context, id string) context.Context {
	if id == "" || len(id) > 64 {
		return With(ctx)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	el, ok := l.by[id]
	if ok {
		l.recent.MoveToFront(el)
	} else {
		if l.by == nil {
			l.by = make(map[string]*list.Element)
		}
		el = l.recent.PushFront(&Budget{id: id})
		l.by[id] = el
		if l.recent.Len() > maxLayers {
			delete(l.by, l.recent.Remove(l.recent.Back()).(*Budget).id)
		}
	}
	return context.WithValue(ctx, key{}, el.Value.(*Budget))
}

// Package layerbudget bounds how often a key broker is asked for one layer,
// however many keys the layer says that it is wrapped with.
package layerbudget

import (
	"container/list"
	"context"
	"crypto/rand"
	"sync"
	"sync/atomic"
)

// Calls is how often a broker is asked for one layer. It is enough for as many
// recipients as a layer can have, 64, in any order: two calls each, one of which
// learns that the KEK is not given out.
const Calls = 128

// Header is the name of the gRPC header by which a key provider knows the calls that
// are about one layer.
const Header = "pilot-layer"

// maxLayers is how many layers are counted separately that others ask for.
const maxLayers = 1024

type key struct{}

// Budget is what is left for one layer. It is safe for concurrent use.
type Budget struct {
	id   string
	used atomic.Int64
}

// With returns a context with a budget for one layer: ctx if it has one.
func With(ctx context.Context) context.Context {
	if of(ctx) != nil {
		return ctx
	}
	return context.WithValue(ctx, key{}, &Budget{id: rand.Text()})
}

func of(ctx context.Context) *Budget {
	b, _ := ctx.Value(key{}).(*Budget)
	return b
}

// ID returns what the context's layer is called in [Header], or "".
func ID(ctx context.Context) string {
	if b := of(ctx); b != nil {
		return b.id
	}
	return ""
}

// Take reports whether the broker may be asked once more for the context's layer. It
// always may where there is no budget.
func Take(ctx context.Context) bool {
	b := of(ctx)
	return b == nil || b.used.Add(1) <= Calls
}

// Layers has the budgets of layers that others ask for, by the ID that they give. It is
// safe for concurrent use.
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

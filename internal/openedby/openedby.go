// Package openedby carries from a key provider in this process to its caller with which KEK
// it has unwrapped a layer key. The key provider's interface returns the layer key alone, and
// an annotation may name many KEKs, any of which can be a lie.
package openedby

import "context"

// KEK is a KEK of the broker's that has unwrapped a layer key.
type KEK struct {
	ID      string
	Version int    // 0 where the broker has no versions
	Method  string // of the annotation
}

type key struct{}

// With returns a context in which one layer key is unwrapped, and where [Report] puts the
// KEK. That stays empty if it was another key.
func With(ctx context.Context) (context.Context, *KEK) {
	kek := new(KEK)
	return context.WithValue(ctx, key{}, kek), kek
}

// Report says which KEK has unwrapped the layer key of the context. Only the key provider
// that calls it may have the KEK: not one that asks another program.
func Report(ctx context.Context, kek KEK) {
	if to, ok := ctx.Value(key{}).(*KEK); ok {
		*to = kek
	}
}

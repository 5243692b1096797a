// Package openedby carries from a key provider in this process to its caller with which KEK
// it has unwrapped a layer key. The key provider's interface returns the layer key alone, and
// an annotation may name many KEKs, any of which can be a lie.
package openedby

import (
	"context"
	"slices"

	"github.com/opencontainers/go-digest"
)

// Opener is what has unwrapped a layer key.
type Opener struct {
	// Scheme is ocicrypt's name of how the key was wrapped, such as jwe or provider.pilot.
	Scheme string
	// KEK is the KEK of the broker's that has unwrapped it, or "": another key has.
	KEK     string
	Version int // of the KEK, or 0 where the broker has no versions
	// Public reports that the key was wrapped in a way that is open to others than those who
	// may wrap with the KEK: with its public key, which anybody can have, or for guests of
	// Confidential Containers, which have the KEK themselves.
	Public bool
	// Digest is that of the plain layer, as it was wrapped together with the key, or "". It
	// says which content the key was wrapped for: everybody who could decrypt that can
	// encrypt something else under the same key, and take over what was wrapped.
	Digest digest.Digest
	// Vouches reports that the layer has the content of Digest, which somebody has wrapped
	// who may wrap for the KEK.
	Vouches bool
}

// Vouching returns the Opener of a layer with that content: the digests of the plain blob
// and of the uncompressed layer, either of which tools wrap. Those that are "" are not known.
func (o Opener) Vouching(content ...digest.Digest) Opener {
	o.Vouches = o.KEK != "" && !o.Public && o.Digest != "" && slices.Contains(content, o.Digest)
	return o
}

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

// Report says which KEK has unwrapped the layer key of the context. Only a key provider that
// has used the KEK itself, or asked the broker to, may call it.
func Report(ctx context.Context, kek KEK) {
	if to, ok := ctx.Value(key{}).(*KEK); ok {
		*to = kek
	}
}

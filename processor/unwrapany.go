package processor

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/layerbudget"
)

// maxAttempts bounds the recipients that [UnwrapAny] tries, of all descriptors
// together. Each attempt may be a call to a key broker.
const maxAttempts = 4 * MaxWrappedKeys

// UnwrapAny returns the key of one encrypted layer from several descriptors of
// it, any of which may be wrong, by accident or on purpose. It tries the first
// recipient of each descriptor, then the second of each, and so on, so that one
// descriptor with many recipients does not keep the others from being tried.
//
// A wrong descriptor may hold a key that unwraps, of another layer. So accept is
// called with each key and reports whether it is this layer's; its error ends
// the search.
//
// timeout bounds all waiting for keys, without the time spent in accept. An
// attempt gets half of what is left of it, the last one all. The error wraps
// [ErrNoKey] if no recipient gave the layer's key.
func UnwrapAny(ctx context.Context, timeout time.Duration, keys Keys, descs []ocispec.Descriptor, accept func(*LayerKey) (bool, error)) (*LayerKey, error) {
	ctx = layerbudget.With(ctx)
	var reasons []error
	timedOut := false
	left := maxAttempts
	attempts := inTurn(descs)
	for i, a := range attempts {
		if left == 0 {
			reasons = append(reasons, fmt.Errorf("the layer has more than %d recipients: the others were not tried", maxAttempts))
			break
		}
		share := timeout
		if i < len(attempts)-1 {
			share /= 2
		}
		start := time.Now()
		key, err := a.unwrap(ctx, share, keys, &left)
		timeout -= time.Since(start)
		if err == nil {
			ok, acceptErr := accept(key)
			if ok && acceptErr == nil {
				return key, nil
			}
			key.Clear()
			if acceptErr != nil {
				return nil, acceptErr
			}
			err = fmt.Errorf("%s: its key is not that of this layer", a.scheme)
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		timedOut = timedOut || errors.Is(err, context.DeadlineExceeded)
		reasons = append(reasons, err)
	}
	if timedOut {
		return nil, fmt.Errorf("%w: %w", context.DeadlineExceeded, joined(reasons))
	}
	return nil, fmt.Errorf("%w: %w", ErrNoKey, joined(reasons))
}

// attempt is one recipient of a descriptor.
type attempt struct{ scheme, wrapped, public string }

func (a attempt) unwrap(ctx context.Context, timeout time.Duration, keys Keys, left *int) (*LayerKey, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	key, err := unwrapWith(ctx, keys, a.scheme, a.wrapped, a.public, left)
	if err != nil && ctx.Err() != nil {
		return nil, fmt.Errorf("unwrap the layer key with %s: %w", a.scheme, late(ctx.Err()))
	}
	return key, err
}

// inTurn returns the first recipient of each descriptor, then the second of
// each, and so on, each different one once.
func inTurn(descs []ocispec.Descriptor) []attempt {
	var all []attempt
	seen := make(map[attempt]bool)
	lists := make([][]attempt, len(descs))
	for i, desc := range descs {
		for _, scheme := range wrappedWith(desc) {
			for _, wrapped := range strings.SplitN(desc.Annotations[annotationKeysPrefix+scheme], ",", MaxWrappedKeys+1) {
				if len(lists[i]) < MaxWrappedKeys {
					lists[i] = append(lists[i], attempt{scheme, wrapped, desc.Annotations[annotationPubOpts]})
				}
			}
		}
	}
	for round := range MaxWrappedKeys {
		for _, list := range lists {
			if round < len(list) && !seen[list[round]] {
				seen[list[round]] = true
				all = append(all, list[round])
			}
		}
	}
	return all
}

// HasRecipients reports whether the annotations of an encrypted layer's
// descriptor hold its key, wrapped for anybody.
func HasRecipients(desc ocispec.Descriptor) bool { return len(wrappedWith(desc)) > 0 }

package keyprovider

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/publickek"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// wrapHPKE wraps optsdata for the public half of the KEK named id, or returns nil if there
// is no file of one.
func (p *Provider) wrapHPKE(id string, optsdata []byte) (*wireformat.Annotation, error) {
	if p.conf.PublicKey == nil {
		return nil, nil
	}
	key, err := p.conf.PublicKey(id)
	if key == nil || err != nil {
		return nil, err
	}
	a, err := key.Wrap(optsdata)
	if err != nil {
		return nil, fmt.Errorf("wrap for the public key of KEK %q: %w", id, err)
	}
	return &a, nil
}

// unwrapHPKE unwraps a, whose method is HPKE, with the private key that is derived from
// kek, which the caller clears.
func (p *Provider) unwrapHPKE(kek client.KEK, a wireformat.Annotation) ([]byte, error) {
	key, kept, err := p.keks.private(kek, a.KEKVersion)
	if err != nil {
		return nil, err
	}
	if !kept {
		defer key.Clear()
	}
	optsdata, err := key.Unwrap(a)
	if errors.Is(err, publickek.ErrNotUnwrapped) {
		return nil, errWrongKEK
	}
	return optsdata, err
}

// private returns the private key that is derived from a KEK for a version: the KEK's own,
// or another if the broker has no versions. It is kept beside the KEK. If the KEK is not
// kept, the caller clears the private key.
func (c *cache) private(kek client.KEK, version int) (_ *publickek.PrivateKey, kept bool, _ error) {
	key := cacheKey{kek.ID, version}
	c.mu.Lock()
	if el := c.entries[key]; el != nil {
		if k := el.Value.(*cacheEntry).private; k != nil {
			c.mu.Unlock()
			return k, true, nil
		}
	}
	c.mu.Unlock()
	k, err := publickek.Derive(kek.Key, kek.ID, version)
	if err != nil {
		return nil, false, fmt.Errorf("has no public half: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	// Unless it was dropped meanwhile, or another goroutine has derived it.
	if el := c.entries[key]; el != nil {
		if e := el.Value.(*cacheEntry); e.private == nil && subtle.ConstantTimeCompare(e.kek.Key, kek.Key) == 1 {
			e.private = k
			return k, true, nil
		}
	}
	return k, false, nil
}

// noBroker is the broker of a provider that has none.
type noBroker struct{}

// errNoBroker is the error of what takes a broker where there is none.
var errNoBroker = errors.New("it takes a broker, and broker is not set: set it, or public-keys to wrap for the KEK without one")

func (noBroker) KEK(_ context.Context, id string, _ int) (client.KEK, error) {
	return client.KEK{}, fmt.Errorf("KEK %q: %w", id, errNoBroker)
}

func (noBroker) Wrap(_ context.Context, id string, _ []byte) (client.Wrapped, error) {
	return client.Wrapped{}, fmt.Errorf("KEK %q: %w", id, errNoBroker)
}

func (noBroker) WrapCoCo(_ context.Context, id string, _ []byte) (client.Wrapped, error) {
	return client.Wrapped{}, fmt.Errorf("KEK %q: %w", id, errNoBroker)
}

func (noBroker) Unwrap(_ context.Context, id string, _ client.Wrapped) ([]byte, error) {
	return nil, fmt.Errorf("KEK %q: %w", id, errNoBroker)
}

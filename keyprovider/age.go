package keyprovider

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/errline"
	"github.com/ctrlplane/pilot/internal/layerbudget"
	"github.com/ctrlplane/pilot/internal/wireformat"
	"github.com/ctrlplane/pilot/keyprovider/agekey"
)

// wrapAge wraps optsdata for a recipient of age.
func (p *Provider) wrapAge(ctx context.Context, recipient string, optsdata []byte) (wireformat.Annotation, error) {
	if p.conf.Format == FormatOriginal {
		return wireformat.Annotation{}, fmt.Errorf("%w: annotation-format %s has no recipients of age", ErrInput, FormatOriginal)
	}
	wrapped, err := agekey.Wrap(ctx, recipient, optsdata)
	if err != nil {
		return wireformat.Annotation{}, fmt.Errorf("%w: %w", ErrInput, err)
	}
	return wireformat.Annotation{Method: wireformat.MethodAge, Recipient: recipient, WrappedKey: wrapped}, nil
}

// unwrapAge unwraps a, whose method is age, with the identities at hand: first those that
// are keys, then those of plugins. Each call of a plugin counts like one of the broker.
func (p *Provider) unwrapAge(ctx context.Context, a wireformat.Annotation, allowed []string) ([]byte, client.KEK, error) {
	kek := client.KEK{ID: agekey.Shown(a.Recipient)}
	if len(allowed) > 0 && !slices.Contains(allowed, a.Recipient) {
		return nil, kek, fmt.Errorf("%w: it is wrapped for %s, and the key given is %q", ErrWrongKEK, kek.ID, strings.Join(allowed, ", "))
	}
	if len(p.conf.AgeIdentities) == 0 {
		return nil, kek, fmt.Errorf("%w: it is wrapped for the age recipient %s, and age-identities is not set here", ErrWrongKEK, kek.ID)
	}
	ids := agekey.Read(p.conf.AgeIdentities)
	optsdata, err := ids.Unwrap(a.WrappedKey)
	if err == nil {
		return optsdata, kek, nil
	}
	var errs []error
	for _, name := range ids.Plugins(a.Recipient) {
		if !layerbudget.Take(ctx) {
			return nil, kek, ErrTooManyKeys
		}
		optsdata, err := ids.UnwrapByPlugin(ctx, name, a.WrappedKey)
		if err == nil {
			return optsdata, kek, nil
		}
		errs = append(errs, err)
	}
	if len(errs) > 0 {
		err = errline.Join(errs...)
	}
	return nil, kek, fmt.Errorf("%w: age recipient %s: %w", ErrWrongKEK, kek.ID, err)
}

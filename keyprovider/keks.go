package keyprovider

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/errline"
	"github.com/ctrlplane/pilot/internal/layerbudget"
	"github.com/ctrlplane/pilot/internal/traceid"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// maxVersions is how many versions of a KEK are tried, newest first, on an
// annotation that does not say which it takes: one in the original's format,
// or one written when the broker had no versions.
const maxVersions = 16

// wrap wraps optsdata for an age recipient, or for the public half of the KEK named id if
// there is a file of it, or else with the KEK's current version: locally, or at the broker
// if the KEK is not exported. It returns the version too, 0 for an age recipient.
func (p *Provider) wrap(ctx context.Context, id string, optsdata []byte) (wireformat.Annotation, int, error) {
	if wireformat.IsAgeRecipient(id) {
		a, err := p.wrapAge(ctx, id, optsdata)
		return a, 0, err
	}
	if a, err := p.wrapHPKE(id, optsdata); a != nil || err != nil {
		a = cmp.Or(a, new(wireformat.Annotation))
		return *a, a.KEKVersion, err
	}
	if p.conf.Format == FormatCopilot {
		return p.wrapAtBroker(ctx, id, optsdata)
	}
	kek, err := p.keks.latest(ctx, id)
	switch {
	case errors.Is(err, client.ErrNotExported) && p.conf.Format == FormatOriginal:
		return wireformat.Annotation{}, 0, fmt.Errorf("annotation-format %s takes the KEK itself: %w", FormatOriginal, err)
	case errors.Is(err, client.ErrNotExported):
		return p.wrapAtBroker(ctx, id, optsdata)
	case err != nil:
		return wireformat.Annotation{}, 0, err
	}
	defer clear(kek.Key)
	a, err := wrap(kek, p.conf.Format, optsdata)
	return a, kek.Version, err
}

func (p *Provider) wrapAtBroker(ctx context.Context, id string, optsdata []byte) (_ wireformat.Annotation, _ int, err error) {
	defer func(start time.Time) { p.metrics.asked(ctx, "wrap", start, err) }(time.Now())
	w, err := p.broker.Wrap(ctx, id, optsdata)
	if err != nil {
		return wireformat.Annotation{}, 0, err
	}
	a := wireformat.Annotation{Method: w.Method, KEKID: id, KEKVersion: w.Version, IV: w.IV, WrappedKey: w.Key}
	if err := a.Validate(); err != nil {
		return wireformat.Annotation{}, 0, fmt.Errorf("wrap with KEK %q: the broker's answer: %w", id, err)
	}
	return a, w.Version, nil
}

// unwrapAtBroker has the broker unwrap a, whose method is A256GCMKW, copilot or HPKE.
// A KEK that the broker refused a moment ago is not tried again.
func (p *Provider) unwrapAtBroker(ctx context.Context, a wireformat.Annotation) (optsdata []byte, _ client.KEK, err error) {
	key := cacheKey{a.KEKID, a.KEKVersion}
	if err := p.keks.refusal(key); err != nil {
		return nil, client.KEK{}, inTrace(ctx, err)
	}
	if !layerbudget.Take(ctx) {
		return nil, client.KEK{}, ErrTooManyKeys
	}
	defer func() { p.keks.refuse(key, err, traceid.Of(ctx)) }()
	defer func(start time.Time) { p.metrics.asked(ctx, "unwrap", start, err) }(time.Now())
	optsdata, err = p.broker.Unwrap(ctx, a.KEKID, client.Wrapped{Version: a.KEKVersion, Method: a.Method, IV: a.IV, Enc: a.Enc, Key: a.WrappedKey})
	if errors.Is(err, client.ErrRejected) {
		err = fmt.Errorf("%w: %w", ErrWrongKEK, err)
	}
	return optsdata, client.KEK{ID: a.KEKID, Version: a.KEKVersion}, err
}

// unwrap tries the KEKs that may open a.
func (p *Provider) unwrap(ctx context.Context, a wireformat.Annotation, allowed []string) ([]byte, client.KEK, error) {
	if a.Method == wireformat.MethodAESGCM {
		return p.unwrapOriginal(ctx, a, allowed)
	}
	if a.Method == wireformat.MethodAge {
		return p.unwrapAge(ctx, a, allowed)
	}
	if len(allowed) > 0 && !slices.Contains(allowed, a.KEKID) {
		return nil, client.KEK{}, fmt.Errorf("%w: it is wrapped with KEK %q, and the key given is %q", ErrWrongKEK, a.KEKID, strings.Join(allowed, ", "))
	}
	if a.Method == wireformat.MethodCopilot {
		return p.unwrapAtBroker(ctx, a)
	}
	optsdata, kek, err := p.unwrapWith(ctx, a, a.KEKID)
	if errors.Is(err, client.ErrNotExported) {
		return p.unwrapAtBroker(ctx, a)
	}
	return optsdata, kek, err
}

// unwrapOriginal tries each KEK that is named, or else the default ones, on an
// annotation that does not say which it takes.
func (p *Provider) unwrapOriginal(ctx context.Context, a wireformat.Annotation, allowed []string) ([]byte, client.KEK, error) {
	if err := refuseOriginal(); err != nil {
		return nil, client.KEK{}, fmt.Errorf("%w: %w", ErrInput, err)
	}
	ids := allowed
	if len(ids) == 0 {
		ids = p.conf.DefaultKEKs
	}
	if len(ids) == 0 {
		return nil, client.KEK{}, fmt.Errorf("%w: an annotation of method %s does not say which KEK it takes: name it as provider:%s:KEK, or set default-keks", ErrInput, wireformat.MethodAESGCM, p.conf.Name)
	}
	var errs []error
	for _, id := range ids {
		optsdata, kek, err := p.unwrapWith(ctx, a, id)
		if err == nil {
			return optsdata, kek, nil
		}
		if ctx.Err() != nil || errors.Is(err, ErrTooManyKeys) {
			return nil, client.KEK{}, err
		}
		errs = append(errs, err)
	}
	return nil, client.KEK{}, errline.Join(errs...)
}

// unwrapWith unwraps a with the version of the KEK that it names, or else with
// any. It returns the KEK without its key.
func (p *Provider) unwrapWith(ctx context.Context, a wireformat.Annotation, id string) ([]byte, client.KEK, error) {
	optsdata, kek, err := p.tryVersions(ctx, a, id)
	if errors.Is(err, ErrWrongKEK) && a.KEKVersion == 0 && p.keks.doubtCurrent(id) {
		// It may have been wrapped with a version newer than what was
		// current when that was fetched.
		return p.tryVersions(ctx, a, id)
	}
	return optsdata, kek, err
}

func (p *Provider) tryVersions(ctx context.Context, a wireformat.Annotation, id string) ([]byte, client.KEK, error) {
	var first error
	version := a.KEKVersion
	for range maxVersions {
		kek, err := p.keks.get(ctx, id, version)
		if err != nil {
			if first == nil || ctx.Err() != nil {
				first = err
			}
			break
		}
		var optsdata []byte
		if a.Method == wireformat.MethodHPKE {
			optsdata, err = p.unwrapHPKE(kek, a)
		} else {
			optsdata, err = unwrap(kek, a)
		}
		clear(kek.Key)
		kek.Key = nil
		if err == nil {
			return optsdata, kek, nil
		}
		if first == nil {
			name := fmt.Sprintf("KEK %q", id)
			if kek.Version != 0 {
				name += fmt.Sprintf(" version %d", kek.Version)
			}
			first = fmt.Errorf("%w: %s %w", ErrWrongKEK, name, err)
		}
		if version = kek.Version - 1; version < 1 || a.KEKVersion != 0 {
			break
		}
	}
	return nil, client.KEK{}, first
}

package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// restoreKeys returns the key annotations of a layer that is encrypted and lost
// them: those that Options.KeysFrom has for it, and the new recipients that are
// not among those. The key is checked against the layer's HMAC first.
func (e *encryption) restoreKeys(ctx context.Context, w *work, desc ocispec.Descriptor) (map[string]string, error) {
	var found []ocispec.Descriptor
	for _, l := range w.KeysFrom {
		if l.Digest == desc.Digest && processor.HasRecipients(l) {
			found = append(found, l)
		}
	}
	if len(found) == 0 {
		return nil, errors.New("it is encrypted and has no keys, as BuildKit leaves the layers of an encrypted base image: " +
			"name the base image that it comes from, to get them from there (--keys-from)")
	}
	var first error
	for _, l := range found {
		annotations, err := e.keysOf(ctx, w, desc, l)
		if err == nil || ctx.Err() != nil {
			return annotations, err
		}
		if first == nil {
			first = err
		}
	}
	return nil, fmt.Errorf("its key can't be taken from the base image: %w", first)
}

// keysOf returns the key annotations that l has for the layer desc, and the new
// recipients.
func (e *encryption) keysOf(ctx context.Context, w *work, desc, l ocispec.Descriptor) (map[string]string, error) {
	unwrapCtx, cancel := context.WithTimeout(ctx, keyTimeout)
	defer cancel()
	key, err := processor.Unwrap(unwrapCtx, e.to.Keys, l)
	if err != nil {
		return nil, err
	}
	defer key.Clear()
	err = w.read(ctx, desc, func(r io.Reader) error { return processor.Verify(r, key) })
	if err != nil {
		return nil, err
	}
	annotations := maps.Clone(l.Annotations)
	maps.DeleteFunc(annotations, func(name, _ string) bool { return !ofEncryption(name) })
	missing := withoutKEKs(e.to, recipientsOf(annotations))
	if len(missing.Parameters) == 0 {
		return annotations, nil
	}
	wrapCtx, cancel := context.WithTimeout(ctx, keyTimeout)
	defer cancel()
	wrapped, err := key.Wrap(wrapCtx, missing, annotations)
	maps.Copy(annotations, wrapped)
	return annotations, err
}

// withoutKEKs returns to without the KEKs among recipients.
func withoutKEKs(to processor.Recipients, recipients []Recipient) processor.Recipients {
	out := to
	out.Parameters = maps.Clone(to.Parameters)
	for _, r := range recipients {
		name, ok := strings.CutPrefix(r.Scheme, providerScheme)
		if !ok || r.KEK == "" {
			continue
		}
		left := slices.DeleteFunc(slices.Clone(out.Parameters[name]), func(kek []byte) bool { return string(kek) == r.KEK })
		if out.Parameters[name] = left; len(left) == 0 {
			delete(out.Parameters, name)
		}
	}
	return out
}

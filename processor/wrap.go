package processor

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containers/ocicrypt/config"
	"github.com/containers/ocicrypt/keywrap"
	"github.com/containers/ocicrypt/keywrap/jwe"
	"github.com/containers/ocicrypt/keywrap/pgp"
	"github.com/containers/ocicrypt/keywrap/pkcs7"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/layerbudget"
	"github.com/ctrlplane/pilot/internal/openedby"
)

// ErrNoKey is the error of a layer whose key could not be unwrapped: it is
// wrapped for somebody else, or no key or key provider was given.
var ErrNoKey = errors.New("no key unwraps the layer key")

// schemes are ocicrypt's ways to wrap a key for a recipient, other than asking
// a key provider, with the parameters that each of them wraps for.
var schemes = []struct{ name, parameter string }{
	{"jwe", "pubkeys"},
	{"pkcs7", "x509s"},
	{"pgp", "gpg-recipients"},
	{"pkcs11", "pkcs11-pubkeys"},
	{"pkcs11", "pkcs11-yamls"},
}

// notRecipients are the parameters of an encryption that name no recipient.
var notRecipients = []string{"gpg-pubkeyringfile", "pkcs11-config"}

const providerScheme = "provider."

// wrapper wraps and unwraps a layer key in one way. Its params are those of a
// [config.EncryptConfig] or [config.DecryptConfig].
type wrapper interface {
	// possible reports whether one of the keys in params may unwrap. It must be
	// called before unwrap.
	possible(params map[string][][]byte) bool
	wrap(ctx context.Context, params map[string][][]byte, private []byte) ([]byte, error)
	unwrap(ctx context.Context, params map[string][][]byte, wrapped []byte) ([]byte, error)
}

// wrapper returns the wrapper of a scheme, which is the end of an annotation's name.
func (k Keys) wrapper(scheme string) (wrapper, error) {
	if name, ok := strings.CutPrefix(scheme, providerScheme); ok {
		p, err := k.provider(name)
		return providerWrapper{name, p}, err
	}
	if err := CheckScheme(scheme); err != nil {
		return nil, err
	}
	switch scheme {
	case "jwe":
		return keyWrapper{jwe.NewKeyWrapper()}, nil
	case "pkcs7":
		return keyWrapper{pkcs7.NewKeyWrapper()}, nil
	case "pgp":
		return keyWrapper{pgp.NewKeyWrapper()}, nil
	case "pkcs11":
		return newPKCS11Wrapper(), nil
	}
	return nil, fmt.Errorf("%.60q is not a way to wrap keys that is known here", scheme)
}

// providerWrapper has a key provider wrap and unwrap. It passes the parameters for that
// key provider and no others.
type providerWrapper struct {
	name     string
	provider KeyProvider
}

func (providerWrapper) possible(map[string][][]byte) bool { return true }

func (w providerWrapper) wrap(ctx context.Context, params map[string][][]byte, private []byte) ([]byte, error) {
	return w.provider.WrapKey(ctx, params[w.name], private)
}

func (w providerWrapper) unwrap(ctx context.Context, params map[string][][]byte, wrapped []byte) ([]byte, error) {
	return w.provider.UnwrapKey(ctx, params[w.name], wrapped)
}

// keyWrapper is one of ocicrypt's. They take no context, and a PKCS#11 module may hang.
// So they can outlive the call, and get copies of the keys, which the caller may clear
// as soon as it returns.
type keyWrapper struct{ keywrap.KeyWrapper }

func (w keyWrapper) wrap(ctx context.Context, params map[string][][]byte, private []byte) ([]byte, error) {
	private = bytes.Clone(private)
	return await(ctx, func() ([]byte, error) {
		defer clear(private)
		// ocicrypt looks for the configuration of PKCS#11 among the keys.
		return w.WrapKeys(&config.EncryptConfig{Parameters: params, DecryptConfig: config.DecryptConfig{Parameters: params}}, private)
	}, nil)
}

func (w keyWrapper) unwrap(ctx context.Context, params map[string][][]byte, wrapped []byte) ([]byte, error) {
	dc := clonedKeys(&config.DecryptConfig{Parameters: params})
	return await(ctx, func() ([]byte, error) {
		defer clearKeys(dc)
		return w.UnwrapKey(dc, wrapped)
	}, func(private []byte) { clear(private) })
}

func (w keyWrapper) possible(params map[string][][]byte) bool { return !w.NoPossibleKeys(params) }

// Wrap wraps the layer key for each of the recipients to and returns the annotations
// that hold it. annotations are those of the layer's descriptor: its recipients are kept
// and the new ones follow them. What was wrapped for nobody but new ones is left out, if
// the annotations say so, as OpenPGP's do. What is wrapped does not depend on the layer's
// content, so this can be done before the layer is encrypted, and fail early.
//
// A key provider gets its own parameters and no others, so no private key reaches it.
//
// What was wrapped is read back, and unwrapped where to has a private key for it. The
// error wraps [ErrTooManyRecipients] if the layer would have wrapped keys that [Unwrap]
// does not try.
func (k *LayerKey) Wrap(ctx context.Context, to Recipients, annotations map[string]string) (map[string]string, error) {
	private, err := k.private()
	if err != nil {
		return nil, err
	}
	defer clear(private)
	// RSA of 2048 bits, which PKCS #11 wraps with, has room for no more.
	short, err := (&LayerKey{Digest: k.Digest, key: k.key, nonce: k.nonce}).private()
	if err != nil {
		return nil, err
	}
	defer clear(short)

	out := make(map[string]string)
	add := func(scheme string) error {
		what := private
		if scheme == "pkcs11" {
			what = short
		}
		value, err := wrapAll(ctx, scheme, to, what)
		if err != nil {
			return err
		}
		id := annotationKeysPrefix + scheme
		if had := notReplaced(scheme, annotations[id], value); had != "" {
			value = had + "," + value
		}
		out[id] = value
		return nil
	}

	recipients := maps.Clone(to.Parameters)
	for _, s := range schemes {
		params, ok := recipients[s.parameter]
		delete(recipients, s.parameter)
		if !ok || len(params) == 0 || out[annotationKeysPrefix+s.name] != "" {
			continue
		}
		if err := add(s.name); err != nil {
			return nil, err
		}
	}
	for _, p := range notRecipients {
		delete(recipients, p)
	}
	for _, provider := range slices.Sorted(maps.Keys(recipients)) {
		if err := add(providerScheme + provider); err != nil {
			return nil, err
		}
	}
	if len(out) == 0 {
		return nil, errors.New("no recipient to wrap the layer key for")
	}
	for id, v := range annotations {
		if _, ok := out[id]; !ok && strings.HasPrefix(id, annotationKeysPrefix) {
			out[id] = v
		}
	}
	return out, CheckWrappedKeys(out)
}

// Unwrap returns the key of the encrypted layer that desc describes. It tries each of the
// layer's recipients, at most [MaxWrappedKeys]: those that private keys may unwrap before
// those that take a key provider. It gives up when ctx is done.
//
// The error wraps [ErrNoKey] if none of them gave the key, and says why not. It also
// wraps [ErrDenied] if each was denied by a key provider.
func Unwrap(ctx context.Context, keys Keys, desc ocispec.Descriptor) (*LayerKey, error) {
	ctx = layerbudget.With(ctx)
	public := desc.Annotations[annotationPubOpts]
	var reasons []error
	left := MaxWrappedKeys
	for _, scheme := range wrappedWith(desc) {
		key, err := unwrapWith(ctx, keys, scheme, desc.Annotations[annotationKeysPrefix+scheme], public, &left)
		if err == nil {
			return key, nil
		}
		if ctx.Err() != nil {
			err = fmt.Errorf("unwrap the layer key with %s: %w", scheme, late(ctx.Err()))
			if len(reasons) > 0 {
				err = fmt.Errorf("%w (before that, %w)", err, joined(reasons))
			}
			return nil, err
		}
		reasons = append(reasons, err)
	}
	if len(reasons) == 0 {
		return nil, fmt.Errorf("%w: the layer has no recipients (no annotation %s…)", ErrNoKey, annotationKeysPrefix)
	}
	return nil, fmt.Errorf("%w: %w", ErrNoKey, joined(reasons))
}

// unwrapWith returns the layer key from the recipients of one scheme, which
// annotation holds, at most left of them.
func unwrapWith(ctx context.Context, keys Keys, scheme, annotation, public string, left *int) (*LayerKey, error) {
	w, err := keys.wrapper(scheme)
	if err != nil {
		return nil, err
	}
	params := keys.private().Parameters
	if !w.possible(params) {
		return nil, fmt.Errorf("%s: no private key was given", scheme)
	}
	private, kek, err := unwrapOne(ctx, w, params, annotation, left)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", scheme, err)
	}
	defer clear(private)
	key, err := newLayerKey(private, public)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", scheme, err)
	}
	key.OpenedBy = newOpener(scheme, kek)
	key.OpenedBy.Digest = key.Digest
	return key, nil
}

// unwrapOne tries the recipients of one scheme, which annotation holds as
// comma-separated base64, at most left of them. kek is the one that has unwrapped it, if it
// is one of the broker's.
func unwrapOne(ctx context.Context, w wrapper, params map[string][][]byte, annotation string, left *int) (private []byte, kek openedby.KEK, err error) {
	var reasons []error
	for wrapped := range strings.SplitSeq(annotation, ",") {
		if *left--; *left < 0 {
			reasons = append(reasons, fmt.Errorf("the layer has more than %d wrapped keys: the others are not tried", MaxWrappedKeys))
			break
		}
		b, err := base64.StdEncoding.DecodeString(wrapped)
		if err != nil {
			reasons = append(reasons, fmt.Errorf("annotation is not base64: %w", err))
			continue
		}
		one, by := openedby.With(ctx)
		private, err := w.unwrap(one, params, b)
		if err == nil && len(private) > 0 {
			return private, *by, nil
		}
		if err == nil {
			err = errors.New("it returned no layer key")
		}
		if ctx.Err() != nil {
			return nil, kek, err
		}
		reasons = append(reasons, err)
	}
	return nil, kek, joined(reasons)
}

// wrappedWith returns the schemes that desc's layer key is wrapped with, key
// providers last.
func wrappedWith(desc ocispec.Descriptor) []string {
	var local, providers []string
	for id, v := range desc.Annotations {
		scheme, ok := strings.CutPrefix(id, annotationKeysPrefix)
		switch {
		case !ok || v == "":
		case strings.HasPrefix(scheme, providerScheme):
			providers = append(providers, scheme)
		default:
			local = append(local, scheme)
		}
	}
	slices.Sort(local)
	slices.Sort(providers)
	return append(local, providers...)
}

// await returns what f returns, or ctx's error if that is done first. f is left
// behind then, and discard, which may be nil, gets what it returns in the end.
func await[T any](ctx context.Context, f func() (T, error), discard func(T)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		value, err := f()
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		if discard != nil {
			go func() {
				if r := <-done; r.err == nil {
					discard(r.value)
				}
			}()
		}
		var none T
		return none, ctx.Err()
	}
}

// late adds a reason to the error of a deadline.
func late(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("the key provider did not answer in time: %w", err)
	}
	return err
}

// Bounds of what joined quotes: bytes of each error, and how many errors.
const (
	maxReason  = 500
	maxReasons = 4
)

// joined returns one line with the first few of errs that differ.
func joined(errs []error) error {
	if len(errs) == 1 {
		return errs[0]
	}
	var lines []string
	for i, err := range errs {
		if len(lines) == maxReasons {
			lines = append(lines, fmt.Sprintf("and %d more", len(errs)-i))
			break
		}
		line := err.Error()
		if len(line) > maxReason {
			line = strings.ToValidUTF8(line[:maxReason], "") + "…"
		}
		if !slices.Contains(lines, line) {
			lines = append(lines, line)
		}
	}
	all := errors.New(strings.Join(lines, "; "))
	if !slices.ContainsFunc(errs, func(err error) bool { return !errors.Is(err, ErrDenied) }) {
		return &allDenied{all}
	}
	return all
}

// allDenied is the error of several recipients each of which was denied.
type allDenied struct{ error }

func (e *allDenied) Is(target error) bool { return target == ErrDenied }

package processor

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const jweKeys = annotationKeysPrefix + "jwe"

func described(t *testing.T, k *LayerKey, p pair) ocispec.Descriptor {
	t.Helper()
	return ocispec.Descriptor{Annotations: wrapped(t, k, p.encrypt(), nil)}
}

// TestUnwrapAnyInTurn has a descriptor with more recipients than are tried
// before the right one.
func TestUnwrapAnyInTurn(t *testing.T) {
	alice, mallory := newPair(t), newPair(t)
	_, k := encrypt(t, randomBytes(100))
	_, other := encrypt(t, randomBytes(100))
	right := described(t, k, alice)
	many := described(t, other, mallory)
	many.Annotations[jweKeys] = strings.Repeat(many.Annotations[jweKeys]+",", 10000)
	wrong := described(t, other, alice) // unwraps
	isRight := func(got *LayerKey) (bool, error) { return got.Equal(k), nil }

	got, err := UnwrapAny(t.Context(), time.Minute, alice.decrypt(), []ocispec.Descriptor{many, wrong, right}, isRight)
	if err != nil || !got.Equal(k) {
		t.Errorf("%v", err)
	}
	_, err = UnwrapAny(t.Context(), time.Minute, alice.decrypt(), []ocispec.Descriptor{many, wrong}, isRight)
	if !errors.Is(err, ErrNoKey) || !strings.Contains(err.Error(), "its key is not that of this layer") {
		t.Errorf("%v", err)
	}
	stop := errors.New("stop")
	_, err = UnwrapAny(t.Context(), time.Minute, alice.decrypt(), []ocispec.Descriptor{wrong, right}, func(*LayerKey) (bool, error) { return false, stop })
	if !errors.Is(err, stop) {
		t.Errorf("%v", err)
	}
}

// TestUnwrapAnyHangs has a key provider that never answers before the right
// recipient.
func TestUnwrapAnyHangs(t *testing.T) {
	silent := withProvider("silent", hangingProvider{})
	alice := newPair(t)
	keys := alice.decrypt()
	keys.Providers = silent.Providers
	_, k := encrypt(t, randomBytes(100))
	hangs := ocispec.Descriptor{Annotations: map[string]string{annotationKeysPrefix + "provider.silent": "e30="}}
	got, err := UnwrapAny(t.Context(), 10*time.Second, keys, []ocispec.Descriptor{hangs, described(t, k, alice)}, func(*LayerKey) (bool, error) { return true, nil })
	if err != nil || !got.Equal(k) {
		t.Errorf("%v", err)
	}
	_, err = UnwrapAny(t.Context(), 100*time.Millisecond, silent, []ocispec.Descriptor{hangs, described(t, k, alice)}, nil)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "provider.silent: the key provider did not answer in time") {
		t.Errorf("%v", err)
	}
}

// Package kmstest is the test suite that each KMS of copilot passes.
package kmstest

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// Settings are those of a backend's table in TOML.
func Settings(text string) kms.Settings {
	return func(v any) error {
		return toml.NewDecoder(strings.NewReader(text)).DisallowUnknownFields().Decode(v)
	}
}

// Opens checks that a backend opens with settings, or that the error says want if that is
// not empty.
func Opens(t *testing.T, types kms.Types, kind, settings, want string) {
	t.Helper()
	b, err := types.Open(kind, Settings(settings))
	if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
		t.Errorf("%s, %s: %v, want %q", kind, settings, err, want)
	}
	if err == nil {
		b.Close()
	}
}

// Secret is what is wrapped.
var Secret = []byte("a key of 32 bytes, as copilot's.")

// CheckWrapper checks what each Wrapper has to do. Its KMS has keys at the paths a
// and b, which have version 1 only.
func CheckWrapper(t *testing.T, w kms.Wrapper, a, b string) {
	t.Helper()
	for _, plaintext := range [][]byte{Secret, []byte("x"), bytes.Repeat([]byte{0}, 31)} {
		version, wrapped, err := w.Wrap(t.Context(), a, plaintext)
		if err != nil || version != 1 || len(plaintext) > 8 && bytes.Contains(wrapped, plaintext) {
			t.Fatalf("wrap %q: version %d, %d bytes, %v", plaintext, version, len(wrapped), err)
		}
		if got, err := w.Unwrap(t.Context(), a, version, wrapped); err != nil || !bytes.Equal(got, plaintext) {
			t.Errorf("unwrap: %q, %v, want %q", got, err, plaintext)
		}
	}
	for _, size := range []int{0, kms.MaxPlaintext + 1} {
		if _, _, err := w.Wrap(t.Context(), a, make([]byte, size)); err == nil {
			t.Errorf("wrapped %d bytes", size)
		}
	}
	version, wrapped, err := w.Wrap(t.Context(), a, Secret)
	if err != nil {
		t.Fatal(err)
	}
	last := bytes.Clone(wrapped)
	last[len(last)-1] ^= 1
	for name, try := range map[string]struct {
		path    string
		version int
		wrapped []byte
	}{
		"the other key":   {b, version, wrapped},
		"another version": {a, version + 1, wrapped},
		"version 0":       {a, 0, wrapped},
		"last bit":        {a, version, last},
		"cut":             {a, version, wrapped[:len(wrapped)-1]},
		"longer":          {a, version, append(bytes.Clone(wrapped), 0)},
		"nothing":         {a, version, nil},
		"one byte":        {a, version, []byte{255}},
		"zeros":           {a, version, make([]byte, 300)},
	} {
		got, err := w.Unwrap(t.Context(), try.path, try.version, try.wrapped)
		if !errors.Is(err, kms.ErrUnwrap) && !(strings.Contains(name, "version") && errors.Is(err, kms.ErrNotFound)) {
			t.Errorf("%s: %q, %v, want ErrUnwrap", name, got, err)
		}
	}
	done, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := w.Wrap(done, a, Secret); !errors.Is(err, kms.ErrUnavailable) || !errors.Is(err, context.Canceled) {
		t.Errorf("wrap after its context: %v", err)
	}
}

// Refuses checks an error of both operations, and that no secret is in it.
func Refuses(t *testing.T, what string, w kms.Wrapper, path string, wrapped []byte, want error) {
	t.Helper()
	_, _, err := w.Wrap(t.Context(), path, Secret)
	if !errors.Is(err, want) || strings.Contains(err.Error(), string(Secret)) {
		t.Errorf("%s: wrap: %v, want %v", what, err, want)
	}
	if _, err := w.Unwrap(t.Context(), path, 1, wrapped); !errors.Is(err, want) {
		t.Errorf("%s: unwrap: %v, want %v", what, err, want)
	}
}

// TimesOut checks that a call to a KMS that never answers returns when its
// context is done, and says so.
func TimesOut(t *testing.T, what string, w kms.Wrapper, path string) {
	t.Helper()
	if err := wrapSoon(t, what, w, path); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%s: %v, want a deadline exceeded", what, err)
	}
}

// Unavailable checks that a call to a KMS that gives no usable answer fails, at
// the latest when its context is done.
func Unavailable(t *testing.T, what string, w kms.Wrapper, path string) {
	t.Helper()
	wrapSoon(t, what, w, path)
}

// wrapSoon returns the error of a call with a short deadline, which no backend
// may outlast by much. A minute is far more than any machine needs.
func wrapSoon(t *testing.T, what string, w kms.Wrapper, path string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, _, err := w.Wrap(ctx, path, Secret)
	if took := time.Since(start); !errors.Is(err, kms.ErrUnavailable) || took > time.Minute {
		t.Errorf("%s: after %v: %v", what, took, err)
	}
	return err
}

// ClosedPort is an address at which nothing listens.
func ClosedPort(t *testing.T) string {
	t.Helper()
	return loopbacktest.FreeAddress(t)
}

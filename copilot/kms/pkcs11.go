//go:build cgo && !no_pkcs11

package kms

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

func init() { types["pkcs11"] = openHSM }

// hsm wraps with AES-256 keys that never leave a PKCS#11 token. The path of a
// key is its CKA_LABEL. Its versions are the keys with that label, told apart by
// CKA_ID: a big-endian number from 1. The current version is the highest one
// that may encrypt.
//
// Wrapped is a nonce of 12 bytes, the AES-GCM ciphertext, as long as the
// plaintext, and its tag of 16 bytes.
type hsm struct {
	settings hsmSettings
	calls    chan struct{} // holds one for each call that is in the module
	rotating chan struct{} // holds one during a rotation

	mu      sync.Mutex
	conn    *hsmConn // nil if there is none
	old     *hsmConn // the last one, which calls may still be in
	refused *refusal
	closed  bool
}

type hsmSettings struct {
	Module  string `toml:"module"`   // the PKCS#11 library's file
	Token   string `toml:"token"`    // the token's label
	Serial  string `toml:"serial"`   // or its serial number, or both
	PINFile string `toml:"pin-file"` // with the user's PIN and nothing else
}

const (
	// maxCalls is how many calls are in a module at once. Those that hang
	// count.
	maxCalls = 8

	gcmNonce = 12 // bytes
	gcmTag   = 16 // bytes
)

func openHSM(settings Settings) (Backend, error) {
	h := &hsm{calls: make(chan struct{}, maxCalls), rotating: make(chan struct{}, 1)}
	if err := settings(&h.settings); err != nil {
		return nil, err
	}
	switch s := h.settings; {
	case !filepath.IsAbs(s.Module):
		return nil, fmt.Errorf("module = %q: give the absolute path of the HSM's PKCS#11 library, as in /usr/lib/softhsm/libsofthsm2.so", s.Module)
	case s.Token == "" && s.Serial == "":
		return nil, errors.New("give the token's label as token, or its serial number as serial")
	case s.PINFile == "":
		return nil, errors.New("give a file with the PIN of the token's user as pin-file")
	}
	if _, err := os.Stat(h.settings.Module); err != nil {
		return nil, fmt.Errorf("module: %w", err)
	}
	if _, _, err := h.settings.pin(); err != nil {
		return nil, fmt.Errorf("pin-file: %w", err)
	}
	return h, nil
}

func (h *hsm) Wrap(ctx context.Context, path string, plaintext []byte) (int, []byte, error) {
	if err := checkPlaintext(plaintext); err != nil {
		return 0, nil, err
	}
	a, err := h.call(ctx, path, plaintext, func(s *hsmSession, plaintext []byte) (hsmAnswer, error) {
		keys, err := s.keys(path)
		if err != nil {
			return hsmAnswer{}, err
		}
		may := slices.DeleteFunc(slices.Clone(keys), func(k hsmKey) bool { return !k.encrypts })
		if len(may) == 0 {
			return hsmAnswer{}, fmt.Errorf("%w: none of its %d versions may encrypt (CKA_ENCRYPT)", ErrForbidden, len(keys))
		}
		current := may[len(may)-1]
		if len(may) > 1 && may[len(may)-2].version == current.version {
			return hsmAnswer{}, fmt.Errorf("%w: it has two keys of version %d: rotate it", ErrUnavailable, current.version)
		}
		wrapped, err := s.seal(current, plaintext, hsmAAD(path, current.version))
		return hsmAnswer{current.version, wrapped}, err
	})
	return a.version, a.bytes, err
}

func (h *hsm) Unwrap(ctx context.Context, path string, version int, wrapped []byte) ([]byte, error) {
	if len(wrapped) <= gcmNonce+gcmTag || len(wrapped) > gcmNonce+MaxPlaintext+gcmTag {
		return nil, fmt.Errorf("%w: it has %d bytes", ErrUnwrap, len(wrapped))
	}
	a, err := h.call(ctx, path, wrapped, func(s *hsmSession, wrapped []byte) (hsmAnswer, error) {
		keys, err := s.keys(path)
		if err != nil {
			return hsmAnswer{}, err
		}
		err = fmt.Errorf("%w: version %d", ErrNotFound, version)
		// Somebody may have made two of a version.
		for _, k := range keys {
			if k.version == version {
				var plaintext []byte
				if plaintext, err = s.open(k, wrapped, hsmAAD(path, version)); err == nil {
					return hsmAnswer{version, plaintext}, nil
				}
			}
		}
		return hsmAnswer{}, err
	})
	return a.bytes, err
}

func (h *hsm) Close() error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.mu.Lock()
		defer h.mu.Unlock()
		h.closed = true
		if h.conn != nil {
			h.conn.release()
			h.conn = nil
		}
	}()
	select {
	case <-done:
		return nil
	case <-time.After(2 * time.Second):
		return fmt.Errorf("%w: module %s hangs", ErrUnavailable, h.settings.Module)
	}
}

// hsmAAD is what a wrapped key is bound to.
func hsmAAD(path string, version int) []byte {
	aad := binary.BigEndian.AppendUint64([]byte("copilot pkcs11 v1\x00"), uint64(version))
	return append(aad, path...)
}

// hsmAnswer is what a call gives: a version, bytes, or both.
type hsmAnswer struct {
	version int
	bytes   []byte
}

// call has f called with a session and a copy of input, which is cleared after
// it. PKCS#11 has no way to stop a call: when ctx is done, it is left to itself.
func (h *hsm) call(ctx context.Context, path string, input []byte, f func(s *hsmSession, input []byte) (hsmAnswer, error)) (hsmAnswer, error) {
	select {
	case <-ctx.Done():
		return hsmAnswer{}, h.late(ctx, path, "not asked")
	default:
	}
	select {
	case h.calls <- struct{}{}:
	case <-ctx.Done():
		return hsmAnswer{}, h.late(ctx, path, "all calls to its module hang")
	}
	type result struct {
		hsmAnswer
		err error
	}
	done := make(chan result, 1)
	input = bytes.Clone(input)
	go func() {
		defer func() { <-h.calls }()
		defer clear(input)
		a, err := h.try(func(s *hsmSession) (hsmAnswer, error) { return f(s, input) })
		done <- result{a, err}
	}()
	select {
	case r := <-done:
		if r.err != nil {
			return hsmAnswer{}, fmt.Errorf("key %q in %s: %w", path, h.settings, r.err)
		}
		return r.hsmAnswer, nil
	case <-ctx.Done():
		go func() { clear((<-done).bytes) }()
		return hsmAnswer{}, h.late(ctx, path, "its module takes too long")
	}
}

// late is the error of a call whose context is done.
func (h *hsm) late(ctx context.Context, path, what string) error {
	return fmt.Errorf("key %q in %s: %w: %s: %w", path, h.settings, ErrUnavailable, what, context.Cause(ctx))
}

// try calls f, and once more with a new connection if the one there was is
// lost. An HSM that forgot a session is not worth an error.
func (h *hsm) try(f func(*hsmSession) (hsmAnswer, error)) (hsmAnswer, error) {
	for again := false; ; again = true {
		c, fresh, err := h.connect()
		if err != nil {
			return hsmAnswer{}, err
		}
		a, err := c.with(f)
		_, lost := errors.AsType[*lostError](err)
		if lost {
			h.drop(c)
		}
		c.release()
		if !lost || fresh || again {
			return a, err
		}
	}
}

// pin reads the PIN.
func (s hsmSettings) pin() (string, os.FileInfo, error) {
	f, err := os.Open(s.PINFile)
	if err != nil {
		return "", nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", nil, err
	}
	if info.Mode().Perm()&0o007 != 0 {
		return "", nil, fmt.Errorf("every user of this machine can read %s (mode %04o): chmod 0600 it, and change the PIN", s.PINFile, info.Mode().Perm())
	}
	b := make([]byte, 256)
	n, err := f.Read(b)
	defer clear(b)
	pin := strings.TrimRight(string(b[:n]), "\r\n")
	if err != nil || pin == "" || n == len(b) || strings.ContainsAny(pin, "\r\n") {
		return "", nil, fmt.Errorf("%s is not one line with a PIN", s.PINFile)
	}
	return pin, info, nil
}

func (s hsmSettings) String() string {
	if s.Token == "" {
		return fmt.Sprintf("token with serial number %q", s.Serial)
	}
	return fmt.Sprintf("token %q", s.Token)
}

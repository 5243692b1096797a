//go:build linux && cgo && !no_pkcs11

// Package pkcs11 wraps with keys of hardware security modules (HSMs) that have a PKCS#11
// library. The build tag no_pkcs11 leaves it out, and so does CGO_ENABLED=0.
package pkcs11

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/internal/regular"
)

// Types returns the types of backends that this package has.
func Types() kms.Types { return kms.Types{"pkcs11": open} }

// hsm wraps with AES-256 keys that never leave a PKCS#11 token. The path of a
// key is its CKA_LABEL. Its versions are the keys with that label, distinguished by
// CKA_ID: a big-endian number from 1. The current version is the highest one
// that may encrypt.
//
// Wrapped is a nonce of 12 bytes, the AES-GCM ciphertext, as long as the
// plaintext, and its tag of 16 bytes.
//
// The module runs in a process of its own, a worker, so that a fault in it takes
// nothing else down.
type hsm struct {
	settings settings
	timeout  time.Duration // of a call to the module
	calls    chan struct{} // holds one for each call that is in the module
	rotating chan struct{} // holds one during a rotation

	mu       sync.Mutex
	worker   *worker // nil if none runs
	loggedIn bool    // the worker is
	login    *login  // that is being made, or nil
	refused  *refusal
	failures int       // one after the other
	retryAt  time.Time // the next login is not before
	failure  error     // of the last one
	starts   uint64    // of workers
	closed   bool
}

// login is a login that is being made.
type login struct {
	done   chan struct{} // closed when there is a result
	worker *worker
	err    error
}

// refusal is a PIN that the token did not accept.
type refusal struct {
	file os.FileInfo
	err  error
}

type settings struct {
	Module      string `toml:"module"`            // the PKCS#11 library's file
	Parameters  string `toml:"module-parameters"` // what C_Initialize gets as pReserved, with a zero byte after it
	Token       string `toml:"token"`             // the token's label
	Serial      string `toml:"serial"`            // or its serial number, or both
	PINFile     string `toml:"pin-file"`          // with the user's PIN and nothing else
	CallTimeout string `toml:"call-timeout"`      // a call that takes longer has the module's process killed
}

const (
	// maxCalls is how many concurrent calls a module gets. Those that hang
	// count.
	maxCalls = 8

	// defaultCallTimeout is longer than a failover of most HSMs.
	defaultCallTimeout = 30 * time.Second

	// Between logins that fail, twice as long each time.
	minRetryInterval = 250 * time.Millisecond
	maxRetryInterval = 30 * time.Second

	gcmNonce = 12 // bytes
	gcmTag   = 16 // bytes
)

func open(decode kms.Settings) (kms.Backend, error) {
	h := &hsm{calls: make(chan struct{}, maxCalls), rotating: make(chan struct{}, 1), timeout: defaultCallTimeout}
	if err := decode(&h.settings); err != nil {
		return nil, err
	}
	switch s := h.settings; {
	case !filepath.IsAbs(s.Module):
		return nil, fmt.Errorf("module = %q: give the absolute path of the HSM's PKCS#11 library, as in /usr/lib/softhsm/libsofthsm2.so", s.Module)
	case s.Token == "" && s.Serial == "":
		return nil, errors.New("give the token's label as token, or its serial number as serial")
	case s.PINFile == "":
		return nil, errors.New("give a file with the PIN of the token's user as pin-file")
	case strings.ContainsRune(s.Parameters, 0):
		return nil, errors.New("module-parameters has a zero byte in it")
	}
	if s := h.settings.CallTimeout; s != "" {
		var err error
		if h.timeout, err = time.ParseDuration(s); err != nil || h.timeout < time.Second || h.timeout > time.Hour {
			return nil, fmt.Errorf("call-timeout = %q: it is not a duration from 1s to 1h", s)
		}
	}
	if _, err := os.Stat(h.settings.Module); err != nil {
		return nil, fmt.Errorf("module: %w", err)
	}
	pin, _, err := h.settings.pin()
	if err != nil {
		return nil, fmt.Errorf("pin-file: %w", err)
	}
	clear(pin)
	return h, nil
}

func (h *hsm) Wrap(ctx context.Context, path string, plaintext []byte) (int, []byte, error) {
	if err := kms.CheckPlaintext(plaintext); err != nil {
		return 0, nil, err
	}
	m, err := h.call(ctx, path, message{kind: requestWrap, fields: [][]byte{[]byte(path), plaintext}})
	if err != nil {
		return 0, nil, err
	}
	return m.version, m.fields[0], nil
}

func (h *hsm) Unwrap(ctx context.Context, path string, version int, wrapped []byte) ([]byte, error) {
	if len(wrapped) <= gcmNonce+gcmTag || len(wrapped) > gcmNonce+kms.MaxPlaintext+gcmTag {
		return nil, fmt.Errorf("%w: it has %d bytes", kms.ErrUnwrap, len(wrapped))
	}
	if version < 1 || version >= math.MaxInt32 {
		return nil, fmt.Errorf("key %q in %s: %w: version %d", path, h.settings, kms.ErrNotFound, version)
	}
	m, err := h.call(ctx, path, message{kind: requestUnwrap, version: version, fields: [][]byte{[]byte(path), wrapped}})
	if err != nil {
		return nil, err
	}
	return m.fields[0], nil
}

// Restarts returns how often the module's process was started again.
func (h *hsm) Restarts() uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return max(h.starts, 1) - 1
}

// Close ends the module's process.
func (h *hsm) Close() error {
	h.mu.Lock()
	h.closed = true
	w := h.worker
	h.worker, h.loggedIn = nil, false
	h.mu.Unlock()
	if w != nil {
		w.close()
	}
	return nil
}

// additionalData is what a wrapped key is bound to.
func additionalData(path string, version int) []byte {
	aad := binary.BigEndian.AppendUint64([]byte("copilot pkcs11 v1\x00"), uint64(version))
	return append(aad, path...)
}

// call sends a copy of a request, which is cleared after it. PKCS#11 has no way to
// stop a call: when ctx is done, it is left to itself.
func (h *hsm) call(ctx context.Context, path string, request message) (message, error) {
	select {
	case <-ctx.Done():
		return message{}, h.late(ctx, path, "not asked")
	default:
	}
	select {
	case h.calls <- struct{}{}:
	case <-ctx.Done():
		return message{}, h.late(ctx, path, "all calls to its module hang")
	}
	type result struct {
		message
		err error
	}
	done := make(chan result, 1)
	fields := make([][]byte, len(request.fields))
	for i, f := range request.fields {
		fields[i] = bytes.Clone(f)
	}
	request.fields = fields
	go func() {
		defer func() { <-h.calls }()
		defer request.clear()
		m, err := h.try(ctx, request)
		done <- result{m, err}
	}()
	select {
	case r := <-done:
		if r.err != nil {
			return message{}, fmt.Errorf("key %q in %s: %w", path, h.settings, r.err)
		}
		return r.message, nil
	case <-ctx.Done():
		go func() { (<-done).clear() }()
		return message{}, h.late(ctx, path, "its module takes too long")
	}
}

// late is the error of a call whose context is done.
func (h *hsm) late(ctx context.Context, path, what string) error {
	return fmt.Errorf("key %q in %s: %w: %s: %w", path, h.settings, kms.ErrUnavailable, what, context.Cause(ctx))
}

// try sends a request, and once more if the login or the process is lost meanwhile.
// An HSM that forgot a session is not worth an error.
func (h *hsm) try(ctx context.Context, request message) (message, error) {
	for again := false; ; {
		w, fresh, err := h.connect()
		if err != nil {
			return message{}, err
		}
		reply, err := w.do(request, h.timeout)
		switch {
		case errors.Is(err, errRetired):
			continue // with the new one
		case err != nil:
			// What has made or renamed a key must not do so twice.
			repeats := request.kind == requestWrap || request.kind == requestUnwrap
			if !errors.Is(err, errEnded) || !repeats || again || ctx.Err() != nil {
				return message{}, fmt.Errorf("%w: %w", kms.ErrUnavailable, err)
			}
			again = true
			continue
		case reply.kind == replyLost:
			h.lost(w)
		case reply.kind == replyOld:
			h.replace()
		default:
			fresh = true
		}
		if fresh || again || ctx.Err() != nil {
			if err := reply.error(); err != nil {
				return message{}, err
			}
			if want := request.kind == requestWrap || request.kind == requestUnwrap; want != (len(reply.fields) == 1) {
				return message{}, fmt.Errorf("%w: %w", kms.ErrUnavailable, errMessage)
			}
			return reply, nil
		}
		again = true
	}
}

// pin reads the PIN, which the caller clears.
func (s settings) pin() ([]byte, os.FileInfo, error) {
	f, err := regular.Open(s.PINFile)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	if info.Mode().Perm()&0o007 != 0 {
		return nil, nil, fmt.Errorf("every user of this machine can read %s (mode %04o): chmod 0600 it, and change the PIN", s.PINFile, info.Mode().Perm())
	}
	b := make([]byte, 256)
	n, err := f.Read(b)
	pin := bytes.TrimRight(b[:n], "\r\n")
	if err != nil || len(pin) == 0 || n == len(b) || bytes.ContainsAny(pin, "\r\n") {
		clear(b)
		return nil, nil, fmt.Errorf("%s is not one line with a PIN", s.PINFile)
	}
	return pin, info, nil
}

func (s settings) String() string {
	if s.Token == "" {
		return fmt.Sprintf("token with serial number %q", s.Serial)
	}
	return fmt.Sprintf("token %q", s.Token)
}

func (h *hsm) log() *logrus.Entry {
	return logrus.WithFields(logrus.Fields{"module": h.settings.Module, "token": h.settings.String()})
}

//go:build linux && cgo && !no_pkcs11

package pkcs11

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/ctrlplane/pilot/copilot/kms"
)

// stable is how long a worker has to be logged in before failures are forgotten.
const stable = 10 * time.Second

// connect returns a worker that is logged in, and whether the login was made now.
func (h *hsm) connect() (w *worker, fresh bool, err error) {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return nil, false, fmt.Errorf("%w: closed", kms.ErrUnavailable)
	}
	if h.loggedIn && h.worker.hasEnded() {
		h.gone(h.worker) // before ended is called
	}
	if h.loggedIn {
		defer h.mu.Unlock()
		if time.Since(h.worker.started) > stable {
			h.failures = 0
		}
		return h.worker, false, nil
	}
	l := h.login
	if l == nil {
		if wait := time.Until(h.retryAt); wait > 0 {
			defer h.mu.Unlock()
			return nil, false, fmt.Errorf("%w (the next attempt is in %v)", h.failure, wait.Round(time.Millisecond))
		}
		l = &login{done: make(chan struct{})}
		h.login = l
		go h.logIn(l, h.worker)
	}
	h.mu.Unlock()
	<-l.done
	return l.worker, true, l.err
}

// logIn makes a login in the worker that is there, or else in a new one, since many
// modules find a token again only after they are reinitialized.
func (h *hsm) logIn(l *login, w *worker) {
	defer close(l.done)
	pin, file, err := h.settings.pin()
	defer clear(pin)
	known := false // what the token would say
	switch r := h.refused; {
	case err != nil:
		err = fmt.Errorf("%w: %w", kms.ErrUnavailable, err)
	case r != nil && os.SameFile(r.file, file) && r.file.ModTime().Equal(file.ModTime()) && r.file.Size() == file.Size():
		err, known = r.err, true
	default:
		if w != nil {
			if err = h.open(w, pin); err != nil && !errors.Is(err, kms.ErrForbidden) {
				w.retire()
				w = nil
			}
		}
		if w == nil {
			if w, err = h.start(); err == nil {
				err = h.open(w, pin)
			}
		}
	}

	h.mu.Lock()
	defer h.mu.Unlock()
	h.login = nil
	if w != nil && w.hasEnded() {
		if err == nil {
			err = fmt.Errorf("%w: %w", kms.ErrUnavailable, errEnded)
		}
		w = nil
	}
	h.worker, h.loggedIn = w, err == nil
	if known {
		// Nothing was tried.
	} else if refused, ok := errors.AsType[*remoteError](err); ok && refused.kind == replyPIN {
		err = fmt.Errorf("%w: it is not tried again until %s changes", err, h.settings.PINFile)
		h.refused = &refusal{file, err}
	} else if err != nil {
		h.failed(err, 1)
	}
	l.worker, l.err = w, err
	if h.closed && w != nil {
		h.worker, h.loggedIn = nil, false
		w.retire()
	}
}

// start starts a worker.
func (h *hsm) start() (*worker, error) {
	w, err := startWorker(h.ended)
	if err != nil {
		return nil, fmt.Errorf("%w: the module's process can't be started: %w", kms.ErrUnavailable, err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.starts++
	return w, nil
}

// open has a worker log in.
func (h *hsm) open(w *worker, pin []byte) error {
	s := h.settings
	reply, err := w.do(message{kind: requestOpen, fields: [][]byte{[]byte(s.Module), []byte(s.Token), []byte(s.Serial), []byte(s.Parameters), pin}}, h.timeout)
	if err != nil {
		return fmt.Errorf("%w: %w", kms.ErrUnavailable, err)
	}
	return reply.error()
}

// ended is called when a worker ends that was not to.
func (h *hsm) ended(w *worker) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.log().WithError(w.reason).Warn("PKCS#11 module's process ended")
	if h.worker != w {
		return // it is logging in, which fails
	}
	h.gone(w)
}

// gone forgets the worker, which has ended. h.mu is held.
func (h *hsm) gone(w *worker) {
	h.worker, h.loggedIn = nil, false
	if h.login != nil {
		return
	}
	w.mu.Lock()
	reason := w.reason
	w.mu.Unlock()
	// A module that crashes once is restarted immediately.
	h.failed(fmt.Errorf("%w: %w: %w", kms.ErrUnavailable, errEnded, reason), 0)
}

// failed delays the next login, longer after each failure in a row: from the first
// failure on if first is 1, from the second on if it is 0.
func (h *hsm) failed(err error, first int) {
	h.failure = err
	h.retryAt = time.Now()
	if n := h.failures + first; n > 0 {
		h.retryAt = h.retryAt.Add(min(minRetryInterval<<min(n-1, 10), maxRetryInterval))
	}
	h.failures++
}

// lost notes that a worker's login is lost.
func (h *hsm) lost(w *worker) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.worker == w {
		h.loggedIn = false
	}
}

// replace makes the next call start a new worker.
func (h *hsm) replace() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.login != nil {
		l := h.login
		h.mu.Unlock()
		<-l.done
		h.mu.Lock()
	}
	if h.worker != nil {
		h.worker.retire()
		h.worker, h.loggedIn = nil, false
	}
}

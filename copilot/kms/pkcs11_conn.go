//go:build cgo && !no_pkcs11

package kms

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/miekg/pkcs11"
)

// hsmConn is a login to a token, with its sessions. It is closed when the
// backend has dropped it and the last call has left it.
type hsmConn struct {
	*hsmModule
	settings hsmSettings
	slot     uint
	login    pkcs11.SessionHandle // open as long as the login has to last
	made     time.Time
	gone     chan struct{} // closed with it

	mu   sync.Mutex
	idle []pkcs11.SessionHandle
	uses int
}

// hsmSession is a session that only one call uses.
type hsmSession struct {
	*hsmConn
	handle pkcs11.SessionHandle
}

// refusal is a PIN that the token did not take.
type refusal struct {
	file os.FileInfo
	err  error
}

// connect returns a connection, to be released, and whether it was made now.
func (h *hsm) connect() (c *hsmConn, fresh bool, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil, false, fmt.Errorf("%w: closed", ErrUnavailable)
	}
	if h.conn == nil {
		if h.old != nil {
			// Many modules find a token again only when they are initialized
			// anew, which no call may be in them for.
			select {
			case <-h.old.gone:
			case <-time.After(time.Second):
			}
		}
		if h.conn, err = h.logIn(); err != nil {
			return nil, false, err
		}
		h.old, fresh = h.conn, true
	}
	h.conn.hold()
	return h.conn, fresh, nil
}

// drop takes a connection out of use.
func (h *hsm) drop(c *hsmConn) {
	h.mu.Lock()
	current := h.conn == c
	if current {
		h.conn = nil
	}
	h.mu.Unlock()
	if current {
		c.release()
	}
}

func (h *hsm) logIn() (*hsmConn, error) {
	pin, file, err := h.settings.pin()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if r := h.refused; r != nil && os.SameFile(r.file, file) && r.file.ModTime().Equal(file.ModTime()) && r.file.Size() == file.Size() {
		return nil, r.err
	}
	m, err := useModule(h.settings.Module)
	if err != nil {
		return nil, err
	}
	c := &hsmConn{hsmModule: m, settings: h.settings, made: time.Now(), gone: make(chan struct{}), uses: 1}
	flags, err := c.findToken()
	if err == nil {
		c.login, err = c.OpenSession(c.slot, pkcs11.CKF_SERIAL_SESSION)
	}
	if err != nil {
		m.leave()
		return nil, hsmError("connect", err)
	}
	// A token counts wrong PINs, and locks itself for good.
	switch {
	case flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		err = fmt.Errorf("%w: its PIN is locked: the security officer has to unlock it", ErrForbidden)
	case flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0:
		err = fmt.Errorf("%w: one more wrong PIN would lock it, so none is tried: log in with another program once, with the right one", ErrForbidden)
	default:
		if err = c.Login(c.login, pkcs11.CKU_USER, pin); errors.Is(err, pkcs11.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN)) {
			err = nil // by another backend of this process
		}
		if refusesPIN(err) {
			err = fmt.Errorf("%w: it does not take the PIN in %s (%s), which is not tried again until that file changes", ErrForbidden, h.settings.PINFile, hsmCode(err))
			h.refused = &refusal{file, err}
		} else if err != nil {
			err = hsmError("log in", err)
		}
	}
	if err != nil {
		c.release()
		return nil, err
	}
	return c, nil
}

func refusesPIN(err error) bool {
	code, _ := errors.AsType[pkcs11.Error](err)
	switch code {
	case pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE, pkcs11.CKR_PIN_EXPIRED, pkcs11.CKR_PIN_LOCKED:
		return true
	}
	return false
}

// findToken finds the token's slot, and returns the token's flags.
func (c *hsmConn) findToken() (flags uint, err error) {
	slots, err := c.GetSlotList(true)
	if err != nil {
		return 0, err
	}
	var others []string
	found := 0
	for _, slot := range slots {
		info, err := c.GetTokenInfo(slot)
		switch {
		case err != nil:
			others = append(others, fmt.Sprintf("slot %d: %s", slot, hsmCode(err)))
		case c.settings.is(info):
			c.slot, flags = slot, info.Flags
			found++
		case info.Label != "":
			others = append(others, fmt.Sprintf("%q", info.Label))
		}
	}
	switch {
	case found > 1:
		return 0, fmt.Errorf("%w: %d tokens are labelled so: give the serial number, too", ErrUnavailable, found)
	case found == 0 && len(others) > 0:
		return 0, fmt.Errorf("%w: it is not there, only %s", ErrUnavailable, strings.Join(others, ", "))
	case found == 0:
		return 0, fmt.Errorf("%w: it is not there, nor any other", ErrUnavailable)
	}
	return flags, nil
}

func (s hsmSettings) is(t pkcs11.TokenInfo) bool {
	return (s.Token == "" || s.Token == t.Label) && (s.Serial == "" || s.Serial == t.SerialNumber)
}

// present checks that the token is still there.
func (c *hsmConn) present() error {
	info, err := c.GetTokenInfo(c.slot)
	if err == nil && !c.settings.is(info) {
		err = pkcs11.Error(pkcs11.CKR_TOKEN_NOT_PRESENT)
	}
	if err != nil {
		return &lostError{err: fmt.Errorf("%w: the token is gone: %s", ErrUnavailable, hsmCode(err))}
	}
	return nil
}

// with calls f with a session. One that f failed in is not used again, as
// something may be left in it.
func (c *hsmConn) with(f func(*hsmSession) (hsmAnswer, error)) (a hsmAnswer, err error) {
	s := &hsmSession{hsmConn: c}
	c.mu.Lock()
	if n := len(c.idle); n > 0 {
		s.handle, c.idle = c.idle[n-1], c.idle[:n-1]
	}
	c.mu.Unlock()
	if s.handle == 0 {
		if s.handle, err = c.OpenSession(c.slot, pkcs11.CKF_SERIAL_SESSION); err != nil {
			return a, hsmError("open a session", err)
		}
	}
	if a, err = f(s); err != nil {
		s.close()
		return a, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.idle = append(c.idle, s.handle)
	return a, nil
}

// readWrite calls f with a session that may change keys.
func (c *hsmConn) readWrite(f func(pkcs11.SessionHandle) error) error {
	rw, err := c.OpenSession(c.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return hsmError("open a session that may write", err)
	}
	defer c.CloseSession(rw)
	return f(rw)
}

// close closes a session, if it is not gone with the token.
func (s *hsmSession) close() { s.CloseSession(s.handle) }

func (c *hsmConn) hold() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.uses++
}

// release lets go of a connection. The last one to do so closes it.
func (c *hsmConn) release() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.uses--; c.uses > 0 {
		return
	}
	for _, handle := range append(c.idle, c.login) {
		c.CloseSession(handle) // fails if it is gone with the token
	}
	c.leave()
	close(c.gone)
}

// hsmModule is a PKCS#11 library. It is initialized while it has users. It is
// never unloaded: libraries that start threads crash when they are.
type hsmModule struct {
	*pkcs11.Ctx
	mu    sync.Mutex
	users int
}

var modules = struct {
	sync.Mutex
	m map[string]*hsmModule
}{m: map[string]*hsmModule{}}

// useModule returns a module to leave when it is no longer used.
func useModule(path string) (*hsmModule, error) {
	modules.Lock()
	m := modules.m[path]
	if m == nil {
		m = &hsmModule{}
		modules.m[path] = m
	}
	modules.Unlock()

	m.mu.Lock()
	defer m.mu.Unlock()
	if m.Ctx == nil {
		if m.Ctx = pkcs11.New(path); m.Ctx == nil {
			return nil, fmt.Errorf("%w: %s can't be loaded: it or a library that it needs is missing, or it is none of PKCS#11", ErrUnavailable, path)
		}
	}
	if m.users == 0 {
		if err := m.Initialize(); err != nil && !errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)) {
			return nil, fmt.Errorf("%w: %s does not start: %s", ErrUnavailable, path, hsmCode(err))
		}
	}
	m.users++
	return m, nil
}

func (m *hsmModule) leave() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.users--; m.users == 0 {
		m.Finalize() // what fails here is gone already
	}
}

// lostError is an error after which a new connection may help.
type lostError struct {
	err  error
	code pkcs11.Error
}

func (e *lostError) Error() string { return e.err.Error() }
func (e *lostError) Unwrap() error { return e.err }

// vague tells whether a code may also mean that the HSM did not like what it
// was given.
func vague(e *lostError) bool {
	return e.code == pkcs11.CKR_GENERAL_ERROR || e.code == pkcs11.CKR_FUNCTION_FAILED
}

// hsmError says what an error of a PKCS#11 call means to our caller.
func hsmError(doing string, err error) error {
	code, ok := errors.AsType[pkcs11.Error](err)
	if !ok {
		return err
	}
	sentinel := ErrUnavailable
	switch code {
	case pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED, pkcs11.CKR_ATTRIBUTE_READ_ONLY, pkcs11.CKR_TOKEN_WRITE_PROTECTED, pkcs11.CKR_ACTION_PROHIBITED:
		sentinel = ErrForbidden
	}
	err = fmt.Errorf("%w: %s: %s", sentinel, doing, hsmCode(err))
	switch code {
	case pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_DEVICE_REMOVED,
		pkcs11.CKR_TOKEN_NOT_PRESENT, pkcs11.CKR_TOKEN_NOT_RECOGNIZED, pkcs11.CKR_SLOT_ID_INVALID,
		pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_USER_NOT_LOGGED_IN,
		pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_KEY_HANDLE_INVALID, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED:
		return &lostError{err: err, code: code}
	}
	return err
}

// hsmCode is an error as PKCS#11 names it.
func hsmCode(err error) string {
	s := err.Error()
	return s[strings.LastIndex(s, " ")+1:]
}

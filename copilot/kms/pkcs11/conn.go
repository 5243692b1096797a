//go:build linux && cgo && !no_pkcs11

package pkcs11

import (
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/miekg/pkcs11"

	"github.com/ctrlplane/pilot/copilot/kms"
)

// conn is a login to a token, with its sessions. It is closed when it
// is no longer the current one and the last call has left it.
type conn struct {
	*module
	label, serial string // of the token; either may be empty
	slot          uint
	login         pkcs11.SessionHandle // open as long as the login has to last

	mu   sync.Mutex
	idle []pkcs11.SessionHandle
	uses int
}

// session is a session that only one call uses.
type session struct {
	*conn
	handle pkcs11.SessionHandle
}

// pinError is a PIN that the token did not accept.
type pinError struct{ err error }

func (e *pinError) Error() string { return e.err.Error() }
func (e *pinError) Unwrap() error { return e.err }

// logIn logs in to the token with a label, a serial number, or both.
func (m *module) logIn(label, serial, pin string) (*conn, error) {
	c := &conn{module: m, label: label, serial: serial, uses: 1}
	flags, err := c.findToken()
	if err == nil {
		c.login, err = c.OpenSession(c.slot, pkcs11.CKF_SERIAL_SESSION)
	}
	if err != nil {
		return nil, callError("connect", err)
	}
	// A token counts wrong PINs, and locks itself permanently.
	switch {
	case flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		err = fmt.Errorf("%w: its PIN is locked: the security officer has to unlock it", kms.ErrForbidden)
	case flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0:
		err = fmt.Errorf("%w: one more wrong PIN would lock it, so none is tried: log in with another program once, with the right one", kms.ErrForbidden)
	default:
		if err = c.Login(c.login, pkcs11.CKU_USER, pin); errors.Is(err, pkcs11.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN)) {
			err = nil // by a connection that calls are still in
		}
		if refusesPIN(err) {
			err = &pinError{fmt.Errorf("%w: it does not accept the PIN (%s)", kms.ErrForbidden, codeName(err))}
		} else if err != nil {
			err = callError("log in", err)
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
func (c *conn) findToken() (flags uint, err error) {
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
			others = append(others, fmt.Sprintf("slot %d: %s", slot, codeName(err)))
		case c.is(info):
			c.slot, flags = slot, info.Flags
			found++
		case info.Label != "":
			others = append(others, fmt.Sprintf("%q", info.Label))
		}
	}
	switch {
	case found > 1:
		return 0, fmt.Errorf("%w: %d tokens have this label: set serial, too", kms.ErrUnavailable, found)
	case found == 0 && len(others) > 0:
		return 0, fmt.Errorf("%w: no such token: the module has only %s", kms.ErrUnavailable, strings.Join(others, ", "))
	case found == 0:
		return 0, fmt.Errorf("%w: no such token: the module has none", kms.ErrUnavailable)
	}
	return flags, nil
}

func (c *conn) is(t pkcs11.TokenInfo) bool {
	return (c.label == "" || c.label == t.Label) && (c.serial == "" || c.serial == t.SerialNumber)
}

// present checks that the token is still there.
func (c *conn) present() error {
	info, err := c.GetTokenInfo(c.slot)
	if err == nil && !c.is(info) {
		err = pkcs11.Error(pkcs11.CKR_TOKEN_NOT_PRESENT)
	}
	if err != nil {
		return &lostError{err: fmt.Errorf("%w: the token is gone: %s", kms.ErrUnavailable, codeName(err))}
	}
	return nil
}

// with calls f with a session. One that f failed in is not used again, as
// something may be left in it.
func (c *conn) with(f func(*session) (message, error)) (a message, err error) {
	s := &session{conn: c}
	c.mu.Lock()
	if n := len(c.idle); n > 0 {
		s.handle, c.idle = c.idle[n-1], c.idle[:n-1]
	}
	c.mu.Unlock()
	if s.handle == 0 {
		if s.handle, err = c.OpenSession(c.slot, pkcs11.CKF_SERIAL_SESSION); err != nil {
			return a, callError("open a session", err)
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
func (c *conn) readWrite(f func(pkcs11.SessionHandle) error) error {
	rw, err := c.OpenSession(c.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return callError("open a session that may write", err)
	}
	defer c.CloseSession(rw)
	return f(rw)
}

// close closes a session, if it is not gone with the token.
func (s *session) close() { s.CloseSession(s.handle) }

func (c *conn) hold() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.uses++
}

// release ends one use of a connection. The last one closes it.
func (c *conn) release() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.uses--; c.uses > 0 {
		return
	}
	for _, handle := range append(c.idle, c.login) {
		c.CloseSession(handle) // fails if it is gone with the token
	}
}

// lostError is an error after which a new login may help, or, if old, a new
// process.
type lostError struct {
	err  error
	code pkcs11.Error
	old  bool
}

func (e *lostError) Error() string { return e.err.Error() }
func (e *lostError) Unwrap() error { return e.err }

// vague reports whether a code may also mean that the HSM rejected its input.
func vague(e *lostError) bool {
	return e.code == pkcs11.CKR_GENERAL_ERROR || e.code == pkcs11.CKR_FUNCTION_FAILED
}

// callError says what an error of a PKCS#11 call means to our caller.
func callError(doing string, err error) error {
	code, ok := errors.AsType[pkcs11.Error](err)
	if !ok {
		return err
	}
	sentinel := kms.ErrUnavailable
	switch code {
	case pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED, pkcs11.CKR_ATTRIBUTE_READ_ONLY, pkcs11.CKR_TOKEN_WRITE_PROTECTED, pkcs11.CKR_ACTION_PROHIBITED:
		sentinel = kms.ErrForbidden
	}
	err = fmt.Errorf("%w: %s: %s", sentinel, doing, codeName(err))
	switch code {
	case pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_DEVICE_REMOVED,
		pkcs11.CKR_TOKEN_NOT_PRESENT, pkcs11.CKR_TOKEN_NOT_RECOGNIZED, pkcs11.CKR_SLOT_ID_INVALID,
		pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_USER_NOT_LOGGED_IN,
		pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_KEY_HANDLE_INVALID, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED:
		return &lostError{err: err, code: code}
	}
	return err
}

// codeName is an error as PKCS#11 names it.
func codeName(err error) string {
	s := err.Error()
	return s[strings.LastIndex(s, " ")+1:]
}

// Package exit has the exit statuses of all programs, and the errors that decide them.
package exit

import (
	"errors"
	"fmt"
	"strings"
)

// Exit statuses. 0 is success, or the answer yes.
const (
	// Failed: something did not work.
	Failed = 1
	// Usage: the command line or the configuration can't be used.
	Usage = 2
	// Denied: everything worked, and the answer is no.
	Denied = 3
)

// Help describes them, in every manual page and the help of every program.
const Help = `The exit status is 0 for success, 1 if something failed, 2 if the command line or
the configuration can't be used, and 3 if the answer is no: not allowed, no such
KEK, or a check that found something.`

// statusError is an error that has its own exit status.
type statusError struct {
	error
	status int
}

func (e *statusError) Unwrap() error { return e.error }

// UsageError returns err as one of the command line or the configuration. It is nil if
// err is.
func UsageError(err error) error { return with(err, Usage) }

// Usagef returns an error of the command line or the configuration.
func Usagef(format string, a ...any) error { return UsageError(fmt.Errorf(format, a...)) }

// CommandUsage returns a usage error of the command at path, such as "copilot keys
// create", which names it and says where there is more.
func CommandUsage(path, problem string) error {
	if _, command, ok := strings.Cut(path, " "); ok {
		problem = command + ": " + problem
	}
	return Usagef("%s (see \"%s --help\")", problem, path)
}

// DeniedError returns err as the answer no. It is nil if err is.
func DeniedError(err error) error { return with(err, Denied) }

func with(err error, status int) error {
	if err == nil {
		return nil
	}
	return &statusError{err, status}
}

// Status returns the exit status for an error, which may be nil. Of several in the
// chain of err the outermost counts.
func Status(err error) int {
	if err == nil {
		return 0
	}
	if e := new(statusError); errors.As(err, &e) {
		return e.status
	}
	return Failed
}

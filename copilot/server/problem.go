package server

import (
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"time"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/server/auditing"
	"github.com/ctrlplane/pilot/copilot/server/authorization"
	"github.com/ctrlplane/pilot/copilot/server/caller"
	"github.com/ctrlplane/pilot/copilot/server/keyring"
	"github.com/ctrlplane/pilot/copilot/server/ratelimit"
	"github.com/ctrlplane/pilot/internal/fips"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

var (
	errNoSuchPath = errors.New("no such path, or not with this method")
	errHost       = errors.New("the request is for another host")
	errWebPage    = errors.New("a web page made the request, and copilot answers none")
)

// statusOf returns the HTTP status and the audit log's verdict for an error.
func statusOf(err error) (int, string) {
	switch {
	case errors.As(err, new(*http.MaxBytesError)):
		return http.StatusRequestEntityTooLarge, audit.Failed
	case errors.As(err, new(*needsApproval)):
		return http.StatusForbidden, audit.Denied
	case errors.As(err, new(*authorization.Denial)), errors.As(err, new(*authorization.NotRenewed)):
		return http.StatusForbidden, audit.Denied
	case errors.Is(err, errNoNodeCA), errors.Is(err, errNoSigner), errors.Is(err, keyring.ErrNoPublic), errors.Is(err, fips.ErrNotApproved):
		return http.StatusConflict, audit.Failed
	case errors.As(err, new(*ratelimit.Exceeded)):
		return http.StatusTooManyRequests, audit.Denied
	case errors.Is(err, caller.ErrIssuer), errors.Is(err, caller.ErrNodes):
		return http.StatusServiceUnavailable, audit.Failed
	case errors.Is(err, caller.ErrUnauthenticated):
		return http.StatusUnauthorized, audit.Denied
	case errors.Is(err, errHost):
		return http.StatusMisdirectedRequest, audit.Denied
	case errors.Is(err, errWebPage):
		return http.StatusForbidden, audit.Denied
	case errors.Is(err, errNoSuchPath):
		return http.StatusNotFound, audit.Denied
	}
	return keyringStatusOf(err), keyring.Verdict(err)
}

// keyringStatusOf returns the HTTP status for an error of the keyring, its store, its
// KMSs or the audit log.
func keyringStatusOf(err error) int {
	is := func(target error) bool { return errors.Is(err, target) }
	switch {
	case is(keyring.ErrNotExported), is(keyring.ErrLimit): // what it has wrapped may still be unwrapped
		return http.StatusConflict
	case is(audit.ErrUnavailable), is(keystore.ErrUnavailable), is(kms.ErrUnavailable):
		return http.StatusServiceUnavailable
	case is(kms.ErrForbidden):
		return http.StatusBadGateway
	case is(keystore.ErrDisabled):
		return http.StatusForbidden
	case is(keystore.ErrNotFound), is(kms.ErrNotFound):
		return http.StatusNotFound
	case is(keystore.ErrExists), is(keystore.ErrState):
		return http.StatusConflict
	case is(keystore.ErrInput), is(kms.ErrUnwrap):
		return http.StatusBadRequest
	}
	return http.StatusInternalServerError
}

// reasonOf returns what the audit log says of an error, which may be more than the caller
// learns.
func reasonOf(err error) string {
	if denial := new(authorization.Denial); errors.As(err, &denial) {
		return denial.Reason
	}
	if refused := new(authorization.NotRenewed); errors.As(err, &refused) {
		return refused.Reason
	}
	return err.Error()
}

// problem is a problem document: RFC 9457.
type problem struct {
	Detail  string `json:"detail"`
	Request string `json:"request"`
	Status  int    `json:"status"`
	Title   string `json:"title"`
	Type    string `json:"type"`
}

// problemOf returns what the caller learns of an error. The rest is in the broker's log,
// under the request's id.
func problemOf(e *auditing.Entry, err error) problem {
	kind, detail := "about:blank", err.Error()
	switch {
	case errors.As(err, new(*notOpen)): // the detail is for the caller
	case e.Status >= http.StatusInternalServerError:
		detail = "the broker failed"
		for _, known := range []error{audit.ErrUnavailable, keystore.ErrUnavailable, kms.ErrUnavailable, kms.ErrForbidden, caller.ErrIssuer, caller.ErrNodes} {
			if errors.Is(err, known) {
				detail = known.Error()
			}
		}
		if cause := audit.Cause(err); cause != "" && errors.Is(err, audit.ErrUnavailable) {
			detail += " (" + cause + ")"
		}
		detail += ": see copilot's log for request " + e.Request
	case errors.As(err, new(*needsApproval)):
		kind = wireformat.ProblemNeedsApproval
	case errors.Is(err, keyring.ErrNotExported):
		kind = wireformat.ProblemNotExported
	case errors.Is(err, errNoSuchPath):
		kind = wireformat.ProblemNoSuchPath
	case errors.Is(err, errNoNodeCA):
		kind = wireformat.ProblemNoNodeCA
	case errors.Is(err, keystore.ErrNoVersion):
		kind = wireformat.ProblemNoSuchVersion
	case errors.Is(err, keyring.ErrLimit):
		detail = keyring.ErrLimit.Error()
	case errors.Is(err, kms.ErrUnwrap):
		detail = kms.ErrUnwrap.Error()
	case errors.Is(err, kms.ErrNotFound):
		detail = kms.ErrNotFound.Error() + ": see the broker's audit log for request " + e.Request
	}
	return problem{Type: kind, Title: http.StatusText(e.Status), Status: e.Status, Detail: detail, Request: e.Request}
}

func writeProblem(w http.ResponseWriter, e *auditing.Entry, err error) {
	if exceeded := new(ratelimit.Exceeded); errors.As(err, &exceeded) {
		w.Header().Set("Retry-After", strconv.Itoa(int(exceeded.RetryAfter/time.Second)+1))
	}
	if e.Status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", `Bearer realm="copilot"`)
	}
	b, _ := json.Marshal(problemOf(e, err))
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(e.Status)
	w.Write(b)
}

package server

import (
	"cmp"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

var (
	errNoSuchPath = errors.New("there is no such path, or not with this method")
	errHost       = errors.New("the request is for another host")
	errWebPage    = errors.New("a web page made the request, and copilot answers none")
	errWho        = errors.New("copilot does not know who asks")
)

// refusal is the error of a request by somebody who may not make it.
type refusal struct {
	who    string
	reason string // for the audit log only
}

// Error says the same of a KEK that is there and of one that is not.
func (r *refusal) Error() string {
	return fmt.Sprintf("%s may not, or there is no such KEK: on the broker's machine, \"copilot policy check\" says why", r.who)
}

// tooMany is the error of a request that is one too many.
type tooMany struct {
	after       time.Duration
	connections int // that are open, if those are too many
}

func (t *tooMany) Error() string {
	if t.connections > 0 {
		return fmt.Sprintf("too many connections: %d are open, which is as many as there may be: use one for several requests, or set connections in a limit of the policy", t.connections)
	}
	return fmt.Sprintf("too many requests: try again in %s", t.after.Round(time.Millisecond))
}

// raw is an answer that is no JSON: a key, in the original's API. It is cleared
// once it is written.
type raw []byte

// secret is an answer that is JSON already, and holds a key. It is cleared once
// it is written. What is left are the buffers of net/http, which the next answer
// overwrites.
type secret []byte

// document is an answer that is JSON already, and no secret.
type document []byte

// audited answers a request with what do returns, after it was written to the
// audit log. A request that can't be is refused.
func (a *api) audited(action string, do func(*http.Request, *entry) (any, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		if !a.opened.Load() {
			a.refuseNotOpen(w, action, start)
			return
		}
		id := make([]byte, 8)
		rand.Read(id) // never fails
		e := &entry{Entry: audit.Entry{
			Request: fmt.Sprintf("%x", id),
			Action:  action,
			KEK:     r.PathValue("id"),
			From:    cmp.Or(r.RemoteAddr, "@"),
			Verdict: audit.Allowed,
			Status:  http.StatusOK,
		}}
		span := trace.SpanFromContext(r.Context())
		if s := span.SpanContext(); s.IsValid() {
			e.Trace = s.TraceID().String()
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		answer, err := a.answer(r, e, do)
		if err != nil {
			e.Status, e.Verdict = statusOf(err)
			e.Reason = err.Error()
			if refused := new(refusal); errors.As(err, &refused) {
				e.Reason = refused.reason
			}
			if refused := new(notRenewed); errors.As(err, &refused) {
				e.Reason = refused.reason
			}
		}
		switch answer := answer.(type) {
		case raw:
			defer clear(answer)
		case secret:
			defer clear(answer)
		}
		if e.written && err != nil || !e.written && (err == nil || !a.summedUp(r, e, err)) {
			if auditErr := a.audit.Write(e.Entry); auditErr != nil {
				a.metrics.auditFailures.Inc()
				e.Status, e.Verdict, err = http.StatusServiceUnavailable, audit.Failed, auditErr
			}
		}
		a.metrics.request(e, time.Since(start))
		span.SetName("copilot " + e.Action)
		span.SetAttributes(attribute.String("copilot.request", e.Request), attribute.String("copilot.kek", e.KEK),
			attribute.Int("copilot.version", e.Version), attribute.String("copilot.verdict", e.Verdict))
		if err != nil {
			span.SetStatus(codes.Error, e.Verdict)
		}
		if e.Status >= http.StatusInternalServerError {
			logrus.WithFields(logrus.Fields{"request": e.Request, "trace": e.Trace, "action": e.Action, "kek": e.KEK}).WithError(err).Error("request failed")
		}
		// A client may have a better certificate by now.
		many := new(tooMany)
		if certificateEnds(r) || r.TLS != nil && errors.Is(err, errWho) || errors.As(err, &many) && many.connections > 0 {
			w.Header().Set("Connection", "close")
		}
		writeAnswer(w, e, answer, err)
	})
}

// answer finds out who asks, and does what they want if they are not too many.
func (a *api) answer(r *http.Request, e *entry, do func(*http.Request, *entry) (any, error)) (any, error) {
	// Before a token is looked at: that may take a request to its issuer. Those who
	// show a certificate do not wait for others at their address, as a node does not
	// for its pods.
	if r.Header.Get("Authorization") != "" {
		if after := a.limits.exhausted(sourceOf(r)); after > 0 {
			e.unknown(r)
			return nil, &tooMany{after: after}
		}
	}
	var err error
	e.Who, err = a.identify(r)
	if err == nil && e.Who == anonymous && !a.anonymous {
		err = errors.New("show a client certificate or a bearer token")
	}
	if err != nil {
		e.unknown(r)
		if after := a.limits.take(sourceOf(r), a.policy.Policy()); after > 0 {
			return nil, &tooMany{after: after}
		}
		return nil, fmt.Errorf("%w: %w", errWho, err)
	}
	if !a.owner {
		conn, _ := r.Context().Value(connectionKey{}).(*connection)
		if err := conn.of(e.Who, a.policy.Policy().Connections(e.Who)); err != nil {
			return nil, err
		}
		if after := a.limits.take(e.Who, a.policy.Policy()); after > 0 {
			return nil, &tooMany{after: after}
		}
	}
	return do(r, e)
}

// source is the caller that stands, for rates, for all at an address who do
// not say who they are.
func source(from string) string {
	host, _, err := net.SplitHostPort(from)
	if err != nil {
		host = from
	}
	return "from " + host
}

// network is source for the audit log's lines: an address of IPv6 stands for its
// network of 64 bits, all of whose addresses one machine can have.
func network(from string) string {
	from = source(from)
	ip, err := netip.ParseAddr(strings.TrimPrefix(from, "from "))
	if err != nil || !ip.Is6() || ip.Is4In6() || ip.IsLoopback() {
		return from
	}
	prefix, err := ip.WithZone("").Prefix(64)
	if err != nil {
		return from
	}
	return "from " + prefix.String()
}

// sourceOf is source for a request. All users of a unix socket have the same address,
// so each is a source by itself.
func sourceOf(r *http.Request) string {
	if peer := peerOf(r.Context()); peer != "" {
		return "from " + peer
	}
	return source(r.RemoteAddr)
}

// unknown notes that the caller is not identified. On a unix socket, the peer's user
// distinguishes callers with bad tokens.
func (e *entry) unknown(r *http.Request) {
	e.Who = anonymous
	if peer := peerOf(r.Context()); peer != "" {
		e.From += " (" + peer + ")"
	}
}

// summedUp reports whether a refused request gets no line of its own.
func (a *api) summedUp(r *http.Request, e *entry, err error) bool {
	caller := e.Who
	switch peer := peerOf(r.Context()); {
	case caller != anonymous:
	case peer != "":
		caller = "from " + peer
	default:
		caller = network(e.From)
	}
	many := new(tooMany)
	return !a.refusals.note(caller, e.Entry, errors.As(err, &many))
}

// statusOf returns the HTTP status and the audit log's verdict for an error.
func statusOf(err error) (int, string) {
	tooLarge, refused, many := new(http.MaxBytesError), new(refusal), new(tooMany)
	switch {
	case errors.As(err, &tooLarge):
		return http.StatusRequestEntityTooLarge, audit.Failed
	case errors.As(err, &refused), errors.As(err, new(*notRenewed)):
		return http.StatusForbidden, audit.Denied
	case errors.Is(err, errNoNodeCA):
		return http.StatusConflict, audit.Failed
	case errors.As(err, &many):
		return http.StatusTooManyRequests, audit.Denied
	case errors.Is(err, errIssuer):
		return http.StatusServiceUnavailable, audit.Failed
	case errors.Is(err, errWho):
		return http.StatusUnauthorized, audit.Denied
	case errors.Is(err, errHost):
		return http.StatusMisdirectedRequest, audit.Denied
	case errors.Is(err, errWebPage):
		return http.StatusForbidden, audit.Denied
	case errors.Is(err, errNoSuchPath):
		return http.StatusNotFound, audit.Denied
	case errors.Is(err, errNotExported):
		return http.StatusConflict, audit.Denied
	case errors.Is(err, errLimit): // what it has wrapped may still be unwrapped
		return http.StatusConflict, audit.Denied
	case errors.Is(err, audit.ErrUnavailable), errors.Is(err, keystore.ErrUnavailable), errors.Is(err, kms.ErrUnavailable):
		return http.StatusServiceUnavailable, audit.Failed
	case errors.Is(err, kms.ErrForbidden):
		return http.StatusBadGateway, audit.Failed
	case errors.Is(err, keystore.ErrDisabled):
		return http.StatusForbidden, audit.Denied
	case errors.Is(err, keystore.ErrNotFound), errors.Is(err, kms.ErrNotFound):
		return http.StatusNotFound, audit.Denied
	case errors.Is(err, keystore.ErrExists), errors.Is(err, keystore.ErrState):
		return http.StatusConflict, audit.Failed
	case errors.Is(err, keystore.ErrInput), errors.Is(err, kms.ErrUnwrap):
		return http.StatusBadRequest, audit.Failed
	}
	return http.StatusInternalServerError, audit.Failed
}

func writeAnswer(w http.ResponseWriter, e *entry, answer any, err error) {
	h := w.Header()
	h.Set("X-Request-Id", e.Request)
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	if err != nil {
		writeProblem(w, e, err)
		return
	}
	var b []byte
	switch answer := answer.(type) {
	case raw:
		h.Set("Content-Type", "application/octet-stream")
		b = answer
	case secret:
		h.Set("Content-Type", "application/json")
		b = answer
	case document:
		h.Set("Content-Type", "application/json")
		b = answer
	default:
		if b, err = json.Marshal(answer); err != nil {
			e.Status = http.StatusInternalServerError
			writeProblem(w, e, err)
			return
		}
		h.Set("Content-Type", "application/json")
	}
	w.Write(b)
}

// writeProblem writes problem details (RFC 9457). What is wrong inside the
// broker is in its log, under the request's id.
func writeProblem(w http.ResponseWriter, e *entry, err error) {
	kind, detail := "about:blank", err.Error()
	switch {
	case errors.As(err, new(*notOpen)): // the detail is for the caller
	case e.Status >= http.StatusInternalServerError:
		detail = "the broker could not do it"
		for _, known := range []error{audit.ErrUnavailable, keystore.ErrUnavailable, kms.ErrUnavailable, kms.ErrForbidden, errIssuer} {
			if errors.Is(err, known) {
				detail = known.Error()
			}
		}
		if cause := audit.Cause(err); cause != "" && errors.Is(err, audit.ErrUnavailable) {
			detail += " (" + cause + ")"
		}
		detail += ": see copilot's log for request " + e.Request
	case errors.Is(err, errNotExported):
		kind = wireformat.ProblemNotExported
	case errors.Is(err, errNoSuchPath):
		kind = wireformat.ProblemNoSuchPath
	case errors.Is(err, errNoNodeCA):
		kind = wireformat.ProblemNoNodeCA
	case errors.Is(err, keystore.ErrNoVersion):
		kind = wireformat.ProblemNoSuchVersion
	case errors.Is(err, errLimit):
		detail = errLimit.Error()
	case errors.Is(err, kms.ErrUnwrap):
		detail = kms.ErrUnwrap.Error()
	case errors.Is(err, kms.ErrNotFound):
		detail = kms.ErrNotFound.Error() + ": see the broker's audit log for request " + e.Request
	}
	if many := new(tooMany); errors.As(err, &many) {
		w.Header().Set("Retry-After", strconv.Itoa(int(many.after/time.Second)+1))
	}
	if e.Status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", `Bearer realm="copilot"`)
	}
	b, _ := json.Marshal(map[string]any{
		"type": kind, "title": http.StatusText(e.Status), "status": e.Status, "detail": detail, "request": e.Request,
	})
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(e.Status)
	w.Write(b)
}

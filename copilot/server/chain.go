package server

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/sirupsen/logrus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/policy"
	"github.com/ctrlplane/pilot/copilot/server/auditing"
	"github.com/ctrlplane/pilot/copilot/server/authorization"
	"github.com/ctrlplane/pilot/copilot/server/caller"
	"github.com/ctrlplane/pilot/copilot/server/keyring"
	"github.com/ctrlplane/pilot/copilot/server/ratelimit"
)

// handler handles a request, and fills in its line of the audit log. It returns the
// answer: see writeAnswer.
type handler func(r *http.Request, e *auditing.Entry) (any, error)

// kekHandler is a handler for a KEK that the caller may use.
type kekHandler func(r *http.Request, e *auditing.Entry, k keyring.KEK) (any, error)

// route is one path of the API: a handler, or one for a KEK and the actions of which the
// caller has to be allowed one.
type route struct {
	action string // in the audit log
	handle handler
	onKEK  kekHandler
	may    []policy.Action
}

// chain returns what a request passes, the last step first.
func (a *api) chain(r route) http.Handler {
	handler := r.handle
	if r.onKEK != nil {
		handler = a.authorized(r.onKEK, r.may...) // authorization: the policy and revocations, for this KEK
	}
	if !a.owner {
		handler = a.limited(handler) // ratelimit: requests and connections of an identity
	}
	handler = a.authenticated(handler)    // caller: token, certificate or unix user
	handler = a.limitedByAddress(handler) // ratelimit: requests that are not authenticated
	handler = a.audited(handler)          // auditing: one line, on disk before the answer
	return a.answered(r.action, handler)  // the answer, or a problem document
}

// authorized calls next with the KEK of the request, if the caller may do one of actions
// with it.
func (a *api) authorized(next kekHandler, actions ...policy.Action) handler {
	return func(r *http.Request, e *auditing.Entry) (any, error) {
		k, err := a.allowed(r.Context(), e, actions...)
		if err != nil {
			return nil, err
		}
		return next(r, e, k)
	}
}

// allowed returns the KEK that a request is about, if the caller may do one of actions
// with it. Other callers learn nothing of it, not even whether it exists.
func (a *api) allowed(ctx context.Context, e *auditing.Entry, actions ...policy.Action) (keyring.KEK, error) {
	return a.find(ctx, e, a.rights(e), actions...)
}

// find is allowed for a caller whose rights are known.
func (a *api) find(ctx context.Context, e *auditing.Entry, c authorization.Caller, actions ...policy.Action) (keyring.KEK, error) {
	if err := c.May(e.KEK, actions...); err != nil {
		return keyring.KEK{}, err
	}
	k, err := a.keks.Find(ctx, e.KEK)
	if err != nil {
		return keyring.KEK{}, err
	}
	if err := c.NotRevoked(k.KEK); err != nil {
		return keyring.KEK{}, err
	}
	k.Who = e.Who
	return k, nil
}

// rights returns what the caller of a request may do.
func (a *api) rights(e *auditing.Entry) authorization.Caller {
	if a.owner {
		return authorization.Owner(e.Caller)
	}
	return authorization.ByPolicy(a.policy.Policy(), e.Caller)
}

// limited calls next unless the caller has too many connections, or sends too many
// requests. Those with tokens that no rule names count by their address: a public issuer
// gives anybody any number of identities.
func (a *api) limited(next handler) handler {
	return func(r *http.Request, e *auditing.Entry) (any, error) {
		p := a.policy.Policy()
		if e.Stranger = e.Caller.Claims != nil && !p.Names(e.Caller, time.Now()); e.Stranger {
			if err := a.requests.Take(caller.Source(r), p); err != nil {
				return nil, err
			}
			return next(r, e)
		}
		if err := ratelimit.Identified(r.Context(), e.Who, p.Connections(e.Who)); err != nil {
			return nil, err
		}
		if err := a.requests.Take(e.Who, p); err != nil {
			return nil, err
		}
		return next(r, e)
	}
}

// authenticated calls next with the caller's identity.
func (a *api) authenticated(next handler) handler {
	return func(r *http.Request, e *auditing.Entry) (any, error) {
		var err error
		if a.owner && r.Header.Get("Authorization") != "" {
			return nil, fmt.Errorf("%w: the admin socket goes by its user: show no token", caller.ErrUnauthenticated)
		}
		e.Caller, err = a.callers.Identify(r)
		e.Who = e.Caller.Identity
		if err != nil {
			return nil, err
		}
		e.Claims = auditing.Claims(e.Caller.Claims, a.policy.Policy().ClaimNames())
		return next(r, e)
	}
}

// limitedByAddress limits the requests from one address, or of one user of a unix
// socket, that are not authenticated.
func (a *api) limitedByAddress(next handler) handler {
	return func(r *http.Request, e *auditing.Entry) (any, error) {
		// Before a token is verified, which may take a request to its issuer. A client
		// certificate is not limited by its address, which a node shares with its pods.
		if r.Header.Get("Authorization") != "" {
			if err := a.requests.Check(caller.Source(r)); err != nil {
				unauthenticated(r, e)
				return nil, err
			}
		}
		answer, err := next(r, e)
		if !errors.Is(err, caller.ErrUnauthenticated) {
			return answer, err
		}
		unauthenticated(r, e)
		if limit := a.requests.Take(caller.Source(r), a.policy.Policy()); limit != nil {
			return nil, limit
		}
		return nil, err
	}
}

// unauthenticated notes in the audit log's line that the caller is not authenticated. On
// a unix socket, its user distinguishes callers.
func unauthenticated(r *http.Request, e *auditing.Entry) {
	e.Who = caller.Anonymous
	if user := caller.User(r.Context()); user != "" {
		e.From += " (" + user + ")"
	}
}

// audited calls next, and writes the line of the audit log. If that fails, nothing is
// answered but the error.
func (a *api) audited(next handler) handler {
	return func(r *http.Request, e *auditing.Entry) (any, error) {
		answer, err := next(r, e)
		return answer, a.write(r.Context(), e, err)
	}
}

// write writes the line of a request that was handled with an error, or nil. It returns
// that error, or the one of writing the line.
func (a *api) write(ctx context.Context, e *auditing.Entry, err error) error {
	if err != nil {
		e.Status, e.Verdict = statusOf(err)
		e.Reason = reasonOf(err)
	}
	if auditErr := a.audit.Request(ctx, e, err, errors.As(err, new(*ratelimit.Exceeded))); auditErr != nil {
		a.metrics.auditFailures.Inc()
		e.Status, e.Verdict = http.StatusServiceUnavailable, audit.Failed
		err = auditErr
	}
	if e.Status >= http.StatusInternalServerError {
		logrus.WithFields(logrus.Fields{"request": e.Request, "trace": e.Trace, "action": e.Action, "kek": e.KEK}).WithError(err).Error("request failed")
	}
	return err
}

// newEntry returns the line of a request, as long as it does not fail.
func newEntry(action, kek, from string) *auditing.Entry {
	id := make([]byte, 8)
	rand.Read(id) // never fails
	return &auditing.Entry{Entry: audit.Entry{
		Request: fmt.Sprintf("%x", id),
		Action:  action,
		KEK:     kek,
		From:    from,
		Verdict: audit.Allowed,
		Status:  http.StatusOK,
	}}
}

// answered answers a request with what next returns.
func (a *api) answered(action string, next handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		e := newEntry(action, r.PathValue("id"), cmp.Or(r.RemoteAddr, "@"))
		if !a.opened.Load() {
			a.refuseNotOpen(w, e, start)
			return
		}
		span := trace.SpanFromContext(r.Context())
		if s := span.SpanContext(); s.IsValid() {
			e.Trace = s.TraceID().String()
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		answer, err := next(r, e)
		switch answer := answer.(type) {
		case raw:
			defer clear(answer)
		case secret:
			defer clear(answer)
		}
		a.metrics.request(e, time.Since(start))
		span.SetName("copilot " + e.Action)
		span.SetAttributes(attribute.String("copilot.request", e.Request), attribute.String("copilot.kek", e.KEK),
			attribute.Int("copilot.version", e.Version), attribute.String("copilot.verdict", e.Verdict))
		if err != nil {
			span.SetStatus(codes.Error, e.Verdict)
		}
		if caller.CertificateEnds(r) || endsConnection(r, err) {
			w.Header().Set("Connection", "close")
		}
		writeAnswer(w, e, answer, err)
	})
}

// endsConnection reports whether an error ends the connection: the client has too many,
// or may have a better certificate by now.
func endsConnection(r *http.Request, err error) bool {
	exceeded := new(ratelimit.Exceeded)
	return r.TLS != nil && errors.Is(err, caller.ErrUnauthenticated) || errors.As(err, &exceeded) && exceeded.Connections > 0
}

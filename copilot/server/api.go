package server

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/policy"
	"github.com/ctrlplane/pilot/internal/keyjson"
	"github.com/ctrlplane/pilot/internal/loopback"
	"github.com/ctrlplane/pilot/internal/status"
)

// Bounds of a request's body, in bytes.
const (
	maxBody      = 128 << 10
	maxPlaintext = 64 << 10
)

// api answers the HTTP API.
type api struct {
	*broker
	// owner says that whoever reaches this listener may do everything.
	owner bool
}

// newAPI returns the API for those who reach a listener.
func newAPI(b *broker) http.Handler { return (&api{b, false}).handler() }

// newAdminAPI returns the API for whoever reaches the admin socket.
func newAdminAPI(b *broker) http.Handler { return (&api{b, true}).handler() }

func (a *api) handler() http.Handler {
	mux := http.NewServeMux()
	status.Health(mux, a.ready)
	if a.owner {
		mux.Handle("GET /metrics", a.metrics.handler())
		mux.HandleFunc("GET "+auditHeadsPath, a.auditHeads)
		status.Profiles(mux)
	}
	for pattern, do := range map[string]struct {
		action string
		do     func(*http.Request, *entry) (any, error)
	}{
		"GET /api/v1/key/{id}":             {"export", a.exportOriginal},
		"GET /api/v2/openapi.json":         {"openapi", a.openAPI},
		"GET /api/v2/keks":                 {"list", a.list},
		"POST /api/v2/keks":                {"create", a.create},
		"GET /api/v2/keks/{id}":            {"info", a.info},
		"GET /api/v2/keks/{id}/key":        {"export", a.export},
		"POST /api/v2/keks/{id}/wrap":      {"wrap", a.wrap},
		"POST /api/v2/keks/{id}/unwrap":    {"unwrap", a.unwrap},
		"POST /api/v2/keks/{id}/rotate":    {"rotate", a.rotate},
		"POST /api/v2/keks/{id}/disable":   {"disable", a.disable},
		"POST /api/v2/keks/{id}/enable":    {"enable", a.enable},
		"POST /api/v2/keks/{id}/destroy":   {"destroy", a.destroy},
		"POST /api/v2/keks/{id}/revoke":    {"revoke", a.revoke},
		"POST /api/v2/keks/{id}/reinstate": {"reinstate", a.reinstate},
		"POST /api/v2/certificate/renew":   {"renew", a.renew},
		"POST /api/v2/keks/{id}/check":     {"check", a.check},
		"/":                                {"other", noSuchPath},
	} {
		mux.Handle(pattern, a.audited(do.action, do.do))
	}
	return otelhttp.NewHandler(a.strict(mux), "copilot")
}

// strict returns h, without the answers that [http.ServeMux] gives by itself
// to paths that are not clean, since those are in no audit log.
func (a *api) strict(h http.Handler) http.Handler {
	other := a.audited("other", noSuchPath)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if p := r.URL.EscapedPath(); !strings.HasPrefix(p, "/") || path.Clean(p) != p {
			other.ServeHTTP(w, r)
			return
		}
		h.ServeHTTP(w, r)
	})
}

func noSuchPath(r *http.Request, _ *entry) (any, error) {
	return nil, fmt.Errorf("%w: %s %s", errNoSuchPath, r.Method, r.URL.EscapedPath())
}

// forLoopback returns h for requests whose Host is this machine, and that no web
// page of elsewhere has a browser here make. Without that, a page could ask for
// KEKs by giving its own name the address 127.0.0.1, or use them without seeing the
// answers.
func forLoopback(h http.Handler, b *broker) http.Handler {
	a := &api{b, false}
	other := a.audited("other", func(r *http.Request, _ *entry) (any, error) {
		return nil, fmt.Errorf("%w, %.80q", errHost, r.Host)
	})
	foreign := a.audited("other", func(r *http.Request, _ *entry) (any, error) {
		return nil, fmt.Errorf("%w (Origin %.80q, Sec-Fetch-Site %.20q)", errWebPage, r.Header.Get("Origin"), r.Header.Get("Sec-Fetch-Site"))
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, err := net.SplitHostPort(r.Host)
		if err != nil {
			host = strings.Trim(r.Host, "[]")
		}
		if !loopback.Is(host) {
			other.ServeHTTP(w, r)
			return
		}
		if fromWebPage(r) {
			foreign.ServeHTTP(w, r)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// fromWebPage reports whether a browser made the request for a page of elsewhere.
// copilot has no pages of its own.
func fromWebPage(r *http.Request) bool {
	origin := r.Header.Values("Origin")
	site := r.Header.Get("Sec-Fetch-Site")
	return len(origin) > 0 && !(len(origin) == 1 && origin[0] == "http://"+r.Host) || site != "" && site != "none" && site != "same-origin"
}

// allowed returns the KEK that a request is about, if whoever makes it may do
// one of actions with it. Whoever may not learns nothing of it, not even
// whether it is there.
func (a *api) allowed(ctx context.Context, e *entry, actions ...policy.Action) (kek, error) {
	if !a.owner {
		if v := a.decide(e.Who, e.KEK, actions...); !v.Allowed {
			return kek{}, &refusal{who: e.Who, reason: v.Reason}
		}
	}
	k, err := a.keks.find(ctx, e.KEK)
	if err != nil {
		return kek{}, err
	}
	if !a.owner && IsRevoked(k.Revoked, e.Who) {
		return kek{}, &refusal{who: e.Who, reason: "the KEK was revoked for " + e.Who}
	}
	k.who = e.Who
	return k, nil
}

// decide returns the first verdict of several actions that allows one, or else
// the first.
func (a *api) decide(who, kek string, actions ...policy.Action) policy.Verdict {
	p, now := a.policy.Policy(), time.Now()
	first := p.Decide(who, kek, actions[0], now)
	for _, action := range actions[1:] {
		if first.Allowed {
			break
		}
		if v := p.Decide(who, kek, action, now); v.Allowed {
			return v
		}
	}
	return first
}

func (a *api) exportOriginal(r *http.Request, e *entry) (any, error) {
	e.KEK = a.originalID(e.KEK)
	k, err := a.allowed(r.Context(), e, policy.Export)
	if err != nil {
		return nil, err
	}
	key, version, err := a.keks.key(r.Context(), k, 0)
	e.Version = version
	return raw(key), err
}

// originalID returns the KEK's name that an id of the original's holds if it is
// the base64 of JSON. The provider dev is the broker's own store. What vault
// tells has to be a KEK of the configuration, at the path that it says there,
// so that no caller chooses what is read.
func (a *api) originalID(id string) string {
	b, err := base64.StdEncoding.DecodeString(id)
	if err != nil {
		return id
	}
	var v struct {
		KEK      string `json:"kek_id"`
		Provider string `json:"kms_provider"`
		Path     string `json:"kms_provider_path"`
	}
	if json.Unmarshal(b, &v) != nil {
		return id
	}
	conf, configured := a.keks.conf[v.KEK]
	switch {
	case v.Provider == "dev" && !configured:
		return v.KEK
	case v.Provider == "vault" && configured && (v.Path == "" || strings.Trim(v.Path, "/") == strings.Trim(conf.Path, "/")):
		return v.KEK
	}
	return id
}

func (a *api) info(r *http.Request, e *entry) (any, error) {
	k, err := a.allowed(r.Context(), e, policy.Actions...)
	if err != nil {
		return nil, err
	}
	return a.describeTo(r.Context(), e.Who, k)
}

// describeTo is describe, without what only those are to know who may admin.
func (a *api) describeTo(ctx context.Context, who string, k kek) (Info, error) {
	info, err := a.describe(ctx, k)
	if !a.owner && !a.decide(who, k.ID, policy.Admin).Allowed {
		info.Revoked, info.Path = nil, ""
	}
	return info, err
}

func (a *api) list(r *http.Request, e *entry) (any, error) {
	wanted := keystore.All
	if !a.owner {
		wanted = a.policy.Policy().Usable(e.Who, time.Now())
	}
	all, err := a.keks.list(r.Context(), wanted)
	if err != nil {
		return nil, err
	}
	list := []Info{}
	for _, k := range all {
		if !a.owner && IsRevoked(k.Revoked, e.Who) {
			continue
		}
		info, err := a.describeTo(r.Context(), e.Who, k)
		if err != nil {
			return nil, err
		}
		list = append(list, info)
	}
	return list, nil
}

func (a *api) export(r *http.Request, e *entry) (any, error) {
	var err error
	if e.Version, err = number(r, "version", 0); err != nil {
		return nil, err
	}
	wraps, err := number(r, "wraps", exportWraps)
	if err == nil && wraps > exportWraps {
		// Whoever may not rotate shall not use a version up.
		err = fmt.Errorf("%w: wraps is %d, and at most %d: ask again after those", keystore.ErrInput, wraps, exportWraps)
	}
	if err != nil {
		return nil, err
	}
	k, err := a.allowed(r.Context(), e, policy.Export)
	if refused := new(refusal); errors.As(err, &refused) {
		// It may be somebody who may have copilot wrap or unwrap.
		switch _, mayUse := a.allowed(r.Context(), e, policy.Wrap, policy.Unwrap); {
		case mayUse == nil:
			return nil, errNotExported
		case errors.As(mayUse, &refused), errors.Is(mayUse, keystore.ErrNotFound):
			return nil, err
		default:
			return nil, mayUse
		}
	}
	if err != nil {
		return nil, err
	}
	var key []byte
	if version := e.Version; version != 0 {
		key, e.Version, err = a.keks.key(r.Context(), k, version)
	} else if k.wrapsHere() {
		// Whoever asks for the current version is going to wrap with it.
		key, e.Version, err = a.keks.current(r.Context(), k, int64(wraps))
	} else {
		err = errNotExported
	}
	if err != nil {
		return nil, err
	}
	defer clear(key)
	return secret(keyjson.Object(keyjson.Value("id", e.KEK), keyjson.Value("version", e.Version), keyjson.Key("key", key))), nil
}

// number returns a number of the query, from 1, or what it is if it is absent.
func number(r *http.Request, name string, absent int) (int, error) {
	text := r.URL.Query().Get(name)
	if text == "" {
		return absent, nil
	}
	n, err := strconv.ParseInt(text, 10, 32)
	if err != nil || n < 1 {
		return 0, fmt.Errorf("%w: %s %.20q is not a number from 1", keystore.ErrInput, name, text)
	}
	return int(n), nil
}

func (a *api) wrap(r *http.Request, e *entry) (any, error) {
	var in struct {
		Plaintext []byte `json:"plaintext"`
	}
	k, err := a.allowed(r.Context(), e, policy.Wrap)
	if err == nil {
		err = decodeSecret(r.Body, &in, "plaintext")
	}
	defer clear(in.Plaintext)
	if err != nil {
		return nil, err
	}
	if len(in.Plaintext) == 0 || len(in.Plaintext) > maxPlaintext {
		return nil, fmt.Errorf("%w: plaintext has %d bytes, not 1 to %d", keystore.ErrInput, len(in.Plaintext), maxPlaintext)
	}
	w, err := a.keks.wrap(r.Context(), k, in.Plaintext)
	e.Version = w.Version
	return struct {
		ID string `json:"id"`
		wrapped
	}{e.KEK, w}, err
}

// wrapped is a key that was wrapped with a KEK.
type wrapped struct {
	Version int    `json:"version"`
	Method  string `json:"method"`
	IV      []byte `json:"iv,omitempty"`
	Key     []byte `json:"wrappedKey"`
}

func (a *api) unwrap(r *http.Request, e *entry) (any, error) {
	var in wrapped
	k, err := a.allowed(r.Context(), e, policy.Unwrap)
	if err == nil {
		err = decodeBody(r, &in)
	}
	if err != nil {
		return nil, err
	}
	if in.Version < 1 {
		return nil, fmt.Errorf("%w: version %d is not from 1", keystore.ErrInput, in.Version)
	}
	e.Version = in.Version
	plaintext, err := a.keks.unwrap(r.Context(), k, in)
	if err != nil {
		return nil, err
	}
	defer clear(plaintext)
	return secret(keyjson.Object(keyjson.Key("plaintext", plaintext))), nil
}

// decodeSecret is decodeBody for a body that holds a key, in a member of one of
// those names.
func decodeSecret(body io.Reader, v any, names ...string) error {
	b, err := keyjson.ReadAll(body)
	defer clear(b)
	if err != nil {
		return bodyError(err)
	}
	if err := keyjson.Decode(b, v, names...); err != nil {
		return errBody
	}
	return nil
}

// errBody does not quote the body, which may hold keys.
var errBody = fmt.Errorf("%w: the body is not the JSON that this path takes", keystore.ErrInput)

// bodyError returns the error of a body that could not be read or decoded.
func bodyError(err error) error {
	if tooLarge := new(http.MaxBytesError); errors.As(err, &tooLarge) {
		return err
	}
	return errBody
}

// decodeBody decodes one JSON value with no unknown fields.
func decodeBody(r *http.Request, v any) error {
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	err := d.Decode(v)
	if err == nil {
		if _, more := d.Token(); more != io.EOF {
			err = errors.New("something follows")
		}
	}
	if err != nil {
		return bodyError(err)
	}
	return nil
}

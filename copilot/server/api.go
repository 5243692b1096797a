package server

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path"
	"strconv"
	"strings"

	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/policy"
	"github.com/ctrlplane/pilot/copilot/server/auditing"
	"github.com/ctrlplane/pilot/copilot/server/authorization"
	"github.com/ctrlplane/pilot/copilot/server/keyring"
	"github.com/ctrlplane/pilot/internal/keyjson"
	"github.com/ctrlplane/pilot/internal/status"
)

// Bounds of a request's body, in bytes.
const (
	maxBody      = 128 << 10
	maxPlaintext = 64 << 10
)

// api handles the HTTP API: chain.go shows what a request passes.
type api struct {
	*broker
	// owner says that callers of this listener may do everything.
	owner bool
}

// newAPI returns the API for callers that the policy applies to.
func newAPI(b *broker) http.Handler { return (&api{b, false}).handler() }

// newAdminAPI returns the API for callers on the admin socket.
func newAdminAPI(b *broker) http.Handler { return (&api{b, true}).handler() }

func (a *api) handler() http.Handler {
	mux := http.NewServeMux()
	status.Health(mux, a.ready)
	if a.owner {
		mux.Handle("GET /metrics", a.metrics.handler())
		mux.HandleFunc("GET "+auditHeadsPath, a.auditHeads)
		mux.Handle("GET "+auditKeyPath, a.chain(route{action: "audit-key", handle: a.auditKey}))
		mux.Handle("GET "+masterPath, a.chain(route{action: "master-status", handle: a.masterStatus}))
		mux.HandleFunc("GET "+masterPath+"/rotation", a.rotationStatus)
		mux.Handle("POST "+masterPath+"/rotate", a.chain(route{action: "master-rotate", handle: a.rotateMaster}))
		mux.Handle("POST "+masterPath+"/forget", a.chain(route{action: "master-forget", handle: a.forgetHolder}))
		mux.Handle("POST "+acknowledgePath, a.chain(route{action: "acknowledge", handle: a.acknowledge}))
		mux.Handle("POST "+checkStorePath, a.chain(route{action: "check", handle: a.checkStore}))
		mux.Handle("POST "+acceptPath, a.chain(route{action: "acknowledge", handle: a.acceptRollback}))
		mux.Handle("POST "+describePath, a.chain(route{action: "describe", handle: a.describeStore}))
		mux.Handle("POST "+backupPath, a.chain(route{action: "backup", handle: a.backup}))
		status.Profiles(mux)
	}
	for pattern, r := range a.routes() {
		mux.Handle(pattern, a.chain(r))
	}
	return otelhttp.NewHandler(a.strict(mux), "copilot")
}

func (a *api) routes() map[string]route {
	admin := []policy.Action{policy.Admin}
	return map[string]route{
		"GET /api/v1/key/{id}":                {action: "export", handle: a.exportOriginal},
		"GET /api/v2/openapi.json":            {action: "openapi", handle: a.openAPI},
		"GET /api/v2/keks":                    {action: "list", handle: a.list},
		"POST /api/v2/keks":                   {action: "create", handle: a.create},
		"GET /api/v2/keks/{id}":               {action: "info", onKEK: a.info, may: policy.Actions},
		"GET /api/v2/keks/{id}/key":           {action: "export", handle: a.export},
		"GET /api/v2/keks/{id}/public":        {action: "public", onKEK: a.public, may: []policy.Action{policy.Public, policy.Admin}},
		"POST /api/v2/keks/{id}/wrap":         {action: "wrap", onKEK: a.wrap, may: []policy.Action{policy.Wrap}},
		"POST /api/v2/keks/{id}/unwrap":       {action: "unwrap", handle: a.unwrap},
		"POST /api/v2/keks/{id}/use":          {action: "use", handle: a.use},
		"POST /api/v2/keks/{id}/rotate":       {action: "rotate", onKEK: a.rotate, may: admin},
		"POST /api/v2/keks/{id}/disable":      {action: "disable", onKEK: a.disable, may: admin},
		"POST /api/v2/keks/{id}/enable":       {action: "enable", onKEK: a.enable, may: admin},
		"POST /api/v2/keks/{id}/destroy":      {action: "destroy", onKEK: a.destroy, may: admin},
		"POST /api/v2/keks/{id}/revoke":       {action: "revoke", onKEK: a.revoke, may: admin},
		"POST /api/v2/keks/{id}/reinstate":    {action: "reinstate", onKEK: a.reinstate, may: admin},
		"POST /api/v2/keks/{id}/check":        {action: "check", onKEK: a.check, may: admin},
		"GET /api/v2/approvals":               {action: "approvals", handle: a.approvals},
		"POST /api/v2/approvals/{id}/approve": {action: "approve", handle: a.approve},
		"POST /api/v2/certificate/renew":      {action: "renew", handle: a.renew},
		"/":                                   {action: "other", handle: noSuchPath},
	}
}

// strict returns h without the answers of [http.ServeMux] to paths that are not clean,
// which would not be audited.
func (a *api) strict(h http.Handler) http.Handler {
	other := a.chain(route{action: "other", handle: noSuchPath})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if p := r.URL.EscapedPath(); !strings.HasPrefix(p, "/") || path.Clean(p) != p {
			other.ServeHTTP(w, r)
			return
		}
		h.ServeHTTP(w, r)
	})
}

func noSuchPath(r *http.Request, _ *auditing.Entry) (any, error) {
	return nil, fmt.Errorf("%w: %s %s", errNoSuchPath, r.Method, r.URL.EscapedPath())
}

func (a *api) exportOriginal(r *http.Request, e *auditing.Entry) (any, error) {
	e.KEK = a.originalID(e.KEK)
	k, err := a.allowed(r.Context(), e, policy.Export)
	if err != nil {
		return nil, err
	}
	if a.outsidePolicy(e) {
		if err := a.approved(r.Context(), e, opExport, "the current version"); err != nil {
			return nil, err
		}
	}
	key, version, err := a.keks.Key(r.Context(), k, 0)
	e.Version = version
	return raw(key), err
}

// originalID returns the KEK's name in an id of the original's API that is the base64 of
// JSON. The provider dev is the broker's own store. With the provider vault, the
// configuration must have the KEK at the same path, so that callers can't choose what is
// read.
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
	location, configured := a.keks.Location(v.KEK)
	switch {
	case v.Provider == "dev" && !configured:
		return v.KEK
	case v.Provider == "vault" && configured && (v.Path == "" || strings.Trim(v.Path, "/") == strings.Trim(location.Path, "/")):
		return v.KEK
	}
	return id
}

func (a *api) info(r *http.Request, e *auditing.Entry, k keyring.KEK) (any, error) {
	return a.describe(r.Context(), e, k)
}

// describe describes a KEK, without what only its admins may know.
func (a *api) describe(ctx context.Context, e *auditing.Entry, k keyring.KEK) (keyring.Info, error) {
	info, err := a.keks.Describe(ctx, k)
	if a.rights(e).May(k.ID, policy.Admin) != nil {
		info.Revoked, info.Path = nil, ""
	}
	return info, err
}

func (a *api) list(r *http.Request, e *auditing.Entry) (any, error) {
	return a.listKEKs(r.Context(), e)
}

// listKEKs describes the KEKs that the caller may do anything with. An admin learns which can't
// be used, for which all of the store is read.
func (a *api) listKEKs(ctx context.Context, e *auditing.Entry) ([]keyring.Info, error) {
	c := a.rights(e)
	var all []keyring.KEK
	var problems map[string]string
	var err error
	if c.Admins() {
		all, problems, err = a.keks.ListChecked(ctx, a.least, c.Usable())
	} else {
		all, err = a.keks.List(ctx, c.Usable())
	}
	if err != nil {
		return nil, err
	}
	list := []keyring.Info{}
	for _, k := range all {
		if c.NotRevoked(k.KEK) != nil {
			continue
		}
		info, err := a.describe(ctx, e, k)
		if err != nil {
			return nil, err
		}
		info.Problem = problems[k.ID]
		list = append(list, info)
	}
	return list, nil
}

func (a *api) export(r *http.Request, e *auditing.Entry) (any, error) {
	var err error
	if e.Version, err = number(r, "version", 0); err != nil {
		return nil, err
	}
	wraps, err := number(r, "wraps", keyring.ExportWraps)
	if err == nil && wraps > keyring.ExportWraps {
		// Callers that may not rotate must not use up a version.
		err = fmt.Errorf("%w: wraps is %d, and at most %d: request the key again after those", keystore.ErrInput, wraps, keyring.ExportWraps)
	}
	if err != nil {
		return nil, err
	}
	k, err := a.allowed(r.Context(), e, policy.Export)
	if denied := new(authorization.Denial); errors.As(err, &denied) {
		// The caller may be one that may wrap or unwrap.
		switch _, mayUse := a.allowed(r.Context(), e, policy.Wrap, policy.Unwrap); {
		case mayUse == nil:
			return nil, keyring.ErrNotExported
		case errors.As(mayUse, &denied), errors.Is(mayUse, keystore.ErrNotFound):
			return nil, err
		default:
			return nil, mayUse
		}
	}
	if err != nil {
		return nil, err
	}
	if a.outsidePolicy(e) {
		what := "the current version"
		if e.Version != 0 {
			what = fmt.Sprintf("version %d", e.Version)
		}
		if err := a.approved(r.Context(), e, opExport, what); err != nil {
			return nil, err
		}
	}
	var key []byte
	if version := e.Version; version != 0 {
		key, e.Version, err = a.keks.Key(r.Context(), k, version)
	} else if k.WrapsHere() {
		// Callers that get the current version are going to wrap with it.
		key, e.Version, err = a.keks.Current(r.Context(), k, int64(wraps))
	} else {
		err = keyring.ErrNotExported
	}
	if err != nil {
		return nil, err
	}
	defer clear(key)
	return secret(keyjson.Object(keyjson.Value("id", e.KEK), keyjson.Value("version", e.Version), keyjson.Key("key", key))), nil
}

// number returns a parameter of the query, which is 1 or more, or absent if it is not
// there.
func number(r *http.Request, name string, absent int) (int, error) {
	text := r.URL.Query().Get(name)
	if text == "" {
		return absent, nil
	}
	n, err := strconv.ParseInt(text, 10, 32)
	if err != nil || n < 1 {
		return 0, fmt.Errorf("%w: %s %.20q is not a number of 1 or more", keystore.ErrInput, name, text)
	}
	return int(n), nil
}

func (a *api) wrap(r *http.Request, e *auditing.Entry, k keyring.KEK) (any, error) {
	var in struct {
		Plaintext []byte `json:"plaintext"`
		Method    string `json:"method"`
	}
	err := decodeSecret(r.Body, &in, "plaintext", "method")
	defer clear(in.Plaintext)
	if err != nil {
		return nil, err
	}
	if len(in.Plaintext) == 0 || len(in.Plaintext) > maxPlaintext {
		return nil, fmt.Errorf("%w: plaintext has %d bytes, not 1 to %d", keystore.ErrInput, len(in.Plaintext), maxPlaintext)
	}
	w, err := a.keks.Wrap(r.Context(), k, in.Plaintext, in.Method)
	e.Version = w.Version
	return struct {
		ID string `json:"id"`
		keyring.Wrapped
	}{e.KEK, w}, err
}

func (a *api) unwrap(r *http.Request, e *auditing.Entry) (any, error) {
	var in struct {
		keyring.Wrapped
		workload
	}
	bad := decodeBody(r, &in)
	who := a.rights(e)
	if bad == nil && in.Workload != "" {
		who, _, bad = a.vouch(e, in.workload)
	}
	k, err := a.find(r.Context(), e, who, policy.Unwrap)
	if err = cmp.Or(err, bad); err != nil {
		return nil, err
	}
	if in.Version < 1 {
		return nil, fmt.Errorf("%w: version %d is not 1 or more", keystore.ErrInput, in.Version)
	}
	e.Version = in.Version
	plaintext, err := a.keks.Unwrap(r.Context(), k, in.Wrapped)
	if err != nil {
		return nil, err
	}
	defer clear(plaintext)
	return secret(keyjson.Object(keyjson.Key("plaintext", plaintext))), nil
}

// workload is one that a caller vouches for, with the labels of its pod, if it has them.
type workload struct {
	Workload string            `json:"workload"`
	Labels   map[string]string `json:"labels"`
}

// vouch notes the workload that the caller vouches for, and the labels that the decision
// depends on, and returns what the caller may do for it. It also returns the keys of all
// labels that the decision can depend on.
func (a *api) vouch(e *auditing.Entry, w workload) (who authorization.Caller, labelKeys []string, err error) {
	if err := policy.CheckWorkload(w.Workload); err != nil {
		return a.rights(e), nil, fmt.Errorf("%w: %w", keystore.ErrInput, err)
	}
	e.Workload, e.Caller.Workload, e.Caller.Labels = w.Workload, w.Workload, w.Labels
	who = a.rights(e)
	labelKeys = who.LabelKeys(e.KEK, policy.Unwrap)
	e.Labels = auditing.Labels(w.Labels, labelKeys)
	return who, labelKeys, nil
}

// use answers whether a KEK may be used for a workload that the caller vouches for, as it
// may be if unwrapping for it is allowed. The key is not touched.
func (a *api) use(r *http.Request, e *auditing.Entry) (any, error) {
	var in struct {
		workload
		Version int `json:"version"`
	}
	var who authorization.Caller
	var labelKeys []string
	bad := decodeBody(r, &in)
	if bad == nil {
		who, labelKeys, bad = a.vouch(e, in.workload)
	}
	if bad == nil && in.Version < 0 {
		bad = fmt.Errorf("%w: version %d is not 1 or more", keystore.ErrInput, in.Version)
	}
	if bad != nil {
		return nil, bad
	}
	e.Version = in.Version
	k, err := a.find(r.Context(), e, who, policy.Unwrap)
	if err == nil {
		err = a.keks.Store.CheckUse(k.KEK, in.Version)
	}
	return struct {
		ID        string   `json:"id"`
		Workload  string   `json:"workload"`
		LabelKeys []string `json:"labelKeys"`
	}{e.KEK, in.Workload, labelKeys}, err
}

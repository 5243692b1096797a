package copilot

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
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

	"github.com/sirupsen/logrus"
)

// Bounds of a request's body, in bytes.
const (
	maxBody      = 128 << 10
	maxPlaintext = 64 << 10
)

// api answers the HTTP API.
type api struct {
	store *Store
	audit *AuditLog
}

// newAPI returns the API that everybody may use who reaches a listener.
func newAPI(store *Store, audit *AuditLog) http.Handler {
	a := &api{store, audit}
	return a.strict(a.mux())
}

// newAdminAPI returns the API for whoever reaches the admin socket.
func newAdminAPI(store *Store, audit *AuditLog) http.Handler {
	a := &api{store, audit}
	mux := a.mux()
	mux.Handle("GET /api/v2/keks", a.audited("list", a.list))
	mux.Handle("POST /api/v2/keks", a.audited("create", a.create))
	mux.Handle("POST /api/v2/keks/{id}/rotate", a.audited("rotate", a.rotate))
	mux.Handle("DELETE /api/v2/keks/{id}", a.audited("delete", a.delete))
	return a.strict(mux)
}

func (a *api) mux() *http.ServeMux {
	mux := http.NewServeMux()
	mux.Handle("GET /healthz", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusNoContent)
	}))
	mux.Handle("GET /api/v1/key/{id}", a.audited("export", a.exportOriginal))
	mux.Handle("GET /api/v2/keks/{id}", a.audited("info", a.info))
	mux.Handle("GET /api/v2/keks/{id}/key", a.audited("export", a.export))
	mux.Handle("POST /api/v2/keks/{id}/wrap", a.audited("wrap", a.wrap))
	mux.Handle("POST /api/v2/keks/{id}/unwrap", a.audited("unwrap", a.unwrap))
	mux.Handle("/", a.audited("other", noSuchPath))
	return mux
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

var (
	errNoSuchPath = errors.New("there is no such path, or not with this method")
	errHost       = errors.New("the request is for another host")
)

func noSuchPath(r *http.Request, _ *Entry) (any, error) {
	return nil, fmt.Errorf("%w: %s %s", errNoSuchPath, r.Method, r.URL.EscapedPath())
}

// forLoopback returns h for requests whose Host is this machine. Without that,
// a web page in a browser here could ask for KEKs by giving its own name the
// address 127.0.0.1.
func forLoopback(h http.Handler, audit *AuditLog) http.Handler {
	a := &api{audit: audit}
	other := a.audited("other", func(r *http.Request, _ *Entry) (any, error) {
		return nil, fmt.Errorf("%w, %.80q", errHost, r.Host)
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, err := net.SplitHostPort(r.Host)
		if err != nil {
			host = strings.Trim(r.Host, "[]")
		}
		if !isLoopback(host) {
			other.ServeHTTP(w, r)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// raw is an answer that is no JSON: a key, in the original's API.
type raw []byte

// audited answers a request with what do returns, after it was written to the
// audit log. A request that can't be is refused.
func (a *api) audited(action string, do func(*http.Request, *Entry) (any, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id := make([]byte, 8)
		rand.Read(id) // never fails
		e := Entry{
			Request: fmt.Sprintf("%x", id),
			Action:  action,
			KEK:     r.PathValue("id"),
			Who:     identity(r),
			From:    r.RemoteAddr,
			Verdict: verdictAllowed,
			Status:  http.StatusOK,
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		answer, err := do(r, &e)
		if err != nil {
			e.Status, e.Verdict = statusOf(err)
			e.Reason = err.Error()
			if e.Status == http.StatusInternalServerError {
				logrus.WithError(err).WithField("request", e.Request).Error("request failed")
			}
		}
		if key, ok := answer.(raw); ok {
			defer clear(key)
		}
		if err != nil || !e.written {
			if auditErr := a.audit.Write(e); auditErr != nil {
				logrus.WithError(auditErr).WithField("request", e.Request).Error("request refused")
				e.Status, err = http.StatusServiceUnavailable, errNoAudit
			}
		}
		h := w.Header()
		h.Set("X-Request-Id", e.Request)
		h.Set("Cache-Control", "no-store")
		h.Set("X-Content-Type-Options", "nosniff")
		if err != nil {
			writeProblem(w, e, err)
			return
		}
		if key, ok := answer.(raw); ok {
			h.Set("Content-Type", "application/octet-stream")
			w.Write(key)
			return
		}
		b, err := json.Marshal(answer)
		if err != nil {
			writeProblem(w, e, err)
			return
		}
		defer clear(b)
		h.Set("Content-Type", "application/json")
		w.Write(b)
	})
}

// statusOf returns the HTTP status and the audit log's verdict for an error.
func statusOf(err error) (int, string) {
	switch tooLarge := new(http.MaxBytesError); {
	case errors.As(err, &tooLarge):
		return http.StatusRequestEntityTooLarge, verdictFailed
	case errors.Is(err, errHost):
		return http.StatusMisdirectedRequest, verdictDenied
	case errors.Is(err, errNoSuchPath):
		return http.StatusNotFound, verdictDenied
	case errors.Is(err, errNoAudit):
		return http.StatusServiceUnavailable, verdictFailed
	case errors.Is(err, ErrNotFound):
		return http.StatusNotFound, verdictDenied
	case errors.Is(err, ErrExists):
		return http.StatusConflict, verdictFailed
	case errors.Is(err, ErrInput):
		return http.StatusBadRequest, verdictFailed
	}
	return http.StatusInternalServerError, verdictFailed
}

// writeProblem writes problem details (RFC 9457). What is wrong inside the
// broker is in its log, under the request's id.
func writeProblem(w http.ResponseWriter, e Entry, err error) {
	detail := err.Error()
	if e.Status == http.StatusInternalServerError {
		detail = "the broker could not do it: see its log for request " + e.Request
	}
	b, _ := json.Marshal(map[string]any{
		"type": "about:blank", "title": http.StatusText(e.Status), "status": e.Status, "detail": detail, "request": e.Request,
	})
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(e.Status)
	w.Write(b)
}

func (a *api) exportOriginal(_ *http.Request, e *Entry) (any, error) {
	e.KEK = originalID(e.KEK)
	key, version, err := a.store.Key(e.KEK, 0)
	e.Version = version
	return raw(key), err
}

// originalID returns the KEK's name that an id of the original's holds if it is
// the base64 of JSON and asks for the provider dev, the broker's own store.
func originalID(id string) string {
	b, err := base64.StdEncoding.DecodeString(id)
	if err != nil {
		return id
	}
	var v struct {
		KEK      string `json:"kek_id"`
		Provider string `json:"kms_provider"`
	}
	if json.Unmarshal(b, &v) != nil || v.Provider != "dev" {
		return id
	}
	return v.KEK
}

func (a *api) info(_ *http.Request, e *Entry) (any, error) {
	return a.store.Get(e.KEK)
}

func (a *api) export(r *http.Request, e *Entry) (any, error) {
	if v := r.URL.Query().Get("version"); v != "" {
		var err error
		if e.Version, err = strconv.Atoi(v); err != nil || e.Version < 1 {
			return nil, fmt.Errorf("%w: version %.20q is not a number from 1", ErrInput, v)
		}
	}
	key, version, err := a.store.Key(e.KEK, e.Version)
	if err != nil {
		return nil, err
	}
	e.Version = version
	return exported{e.KEK, version, key}, nil
}

type exported struct {
	ID      string `json:"id"`
	Version int    `json:"version"`
	Key     []byte `json:"key"`
}

func (a *api) wrap(r *http.Request, e *Entry) (any, error) {
	var in struct {
		Plaintext []byte `json:"plaintext"`
	}
	if err := decodeBody(r, &in); err != nil {
		return nil, err
	}
	defer clear(in.Plaintext)
	if len(in.Plaintext) == 0 || len(in.Plaintext) > maxPlaintext {
		return nil, fmt.Errorf("%w: plaintext has %d bytes, not 1 to %d", ErrInput, len(in.Plaintext), maxPlaintext)
	}
	aead, err := a.kek(e, 0)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, aead.NonceSize())
	rand.Read(nonce) // never fails
	return wrapped{e.KEK, e.Version, aead.Seal(nonce, nonce, in.Plaintext, place(e.KEK, e.Version))}, nil
}

type wrapped struct {
	ID         string `json:"id"`
	Version    int    `json:"version"`
	WrappedKey []byte `json:"wrappedKey"` // 12-byte nonce, ciphertext, 16-byte tag
}

func (a *api) unwrap(r *http.Request, e *Entry) (any, error) {
	var in struct {
		Version    int    `json:"version"`
		WrappedKey []byte `json:"wrappedKey"`
	}
	if err := decodeBody(r, &in); err != nil {
		return nil, err
	}
	if in.Version < 1 {
		return nil, fmt.Errorf("%w: version %d is not from 1", ErrInput, in.Version)
	}
	e.Version = in.Version
	aead, err := a.kek(e, in.Version)
	if err != nil {
		return nil, err
	}
	n := aead.NonceSize()
	if len(in.WrappedKey) < n {
		return nil, fmt.Errorf("%w: wrappedKey of %d bytes is too short", ErrInput, len(in.WrappedKey))
	}
	plaintext, err := aead.Open(nil, in.WrappedKey[:n], in.WrappedKey[n:], place(e.KEK, in.Version))
	if err != nil {
		return nil, fmt.Errorf("%w: this KEK did not wrap that key, or it was changed", ErrInput)
	}
	return unwrapped{plaintext}, nil
}

type unwrapped struct {
	Plaintext []byte `json:"plaintext"`
}

// kek returns the cipher of a KEK that can wrap, and notes its version in e.
func (a *api) kek(e *Entry, version int) (cipher.AEAD, error) {
	key, version, err := a.store.Key(e.KEK, version)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	e.Version = version
	if len(key) != KeySize {
		return nil, fmt.Errorf("%w: the KEK has %d bytes, and only one of %d bytes wraps here", ErrInput, len(key), KeySize)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

func (a *api) list(*http.Request, *Entry) (any, error) {
	return a.store.List()
}

func (a *api) create(r *http.Request, e *Entry) (any, error) {
	var in newKEK
	if err := decodeBody(r, &in); err != nil {
		return nil, err
	}
	e.KEK = in.ID
	var key []byte
	if in.Key != nil {
		e.Action, key = "import", *in.Key
		defer clear(key)
	}
	return a.store.Create(in.ID, key, a.audit.before(e))
}

type newKEK struct {
	ID  string  `json:"id"`
	Key *[]byte `json:"key,omitempty"` // to import; absent: a new random one
}

func (a *api) rotate(_ *http.Request, e *Entry) (any, error) {
	return a.store.Rotate(e.KEK, a.audit.before(e))
}

func (a *api) delete(_ *http.Request, e *Entry) (any, error) {
	return struct{}{}, a.store.Delete(e.KEK, a.audit.before(e))
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
	if tooLarge := new(http.MaxBytesError); errors.As(err, &tooLarge) {
		return err
	}
	if err != nil {
		// The error of encoding/json may quote its input, which holds keys.
		return fmt.Errorf("%w: the body is not the JSON that this path takes", ErrInput)
	}
	return nil
}

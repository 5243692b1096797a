// Package client is the client of the key broker. It speaks copilot's own
// HTTP API and that of the original broker, to one broker or to the nearest of
// several.
package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/ctrlplane/pilot/internal/keyjson"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// Errors that a caller may decide by. What is wrapped around them says which
// KEK and which broker it was about, and what to do.
var (
	// ErrNotFound: the broker has no such KEK, or hides it from this client.
	ErrNotFound = errors.New("no such KEK")
	// ErrNoVersion: the broker has the KEK, but not the requested version, which may
	// have been destroyed. It wraps ErrNotFound.
	ErrNoVersion = fmt.Errorf("%w version", ErrNotFound)
	// ErrForbidden: the broker denies this client the KEK.
	ErrForbidden = errors.New("not allowed")
	// ErrNotExported: the broker does not export the KEK, but wraps and unwraps with
	// it.
	ErrNotExported = errors.New("the broker does not export this KEK")
	// ErrRejected: no broker can serve the request: a key was not wrapped with that
	// KEK, or was changed.
	ErrRejected = errors.New("the broker rejects the request")
	// ErrUnavailable: no broker gave a usable answer in time.
	ErrUnavailable = errors.New("the broker gives no usable answer")

	// ErrCertExpired, ErrCertNotYetValid and ErrCertRejected say what is wrong with
	// the certificate that the client shows.
	ErrCertExpired     = errors.New("broker-cert has expired")
	ErrCertNotYetValid = errors.New("broker-cert is not valid yet")
	ErrCertRejected    = errors.New("the broker does not accept broker-cert")
)

// KEK is a key encryption key.
type KEK struct {
	// ID is the name it was asked for by.
	ID string
	// Version counts from 1. It is 0 when the broker has no versions.
	Version int
	// Key has 16, 24 or 32 bytes.
	Key []byte
}

const (
	originalPath   = "/api/v1/key" // what the original's base URL ends in
	defaultTimeout = 10 * time.Second
	leastTry       = 3 * time.Second // for one try, if the whole timeout is that long

	// wrapsAtOnce is how many layer keys may be wrapped with the current version
	// of a KEK that was asked for: by the one who asked, and by those who did at
	// the same time and got the same answer. The broker counts them.
	wrapsAtOnce = 256
)

// Client asks a broker, or the nearest of several that answers. It is safe for
// concurrent use.
type Client struct {
	brokers  []*endpoint
	original bool        // the brokers are the original's
	token    tokenSource // may be nil
	timeout  time.Duration
	try      time.Duration
	rounds   int // of tries, at most

	certFile, keyFile string // to show the brokers; may be empty
}

// New returns a client for the brokers that conf describes. It does not
// connect yet.
func New(conf Config) (*Client, error) {
	c := &Client{timeout: conf.Timeout, rounds: maxTries, certFile: conf.CertFile, keyFile: conf.KeyFile}
	if c.timeout <= 0 {
		c.timeout = defaultTimeout
	}
	// A single broker that is slow gets more time: a new connection would start at the
	// end of its queue again.
	part := time.Duration(3)
	if len(conf.URLs) == 1 {
		part = 2
	}
	c.try = min(c.timeout, max(leastTry, c.timeout/part))
	var err error
	if c.brokers, err = conf.brokers(); err != nil {
		return nil, err
	}
	for i, b := range c.brokers {
		if i > 0 && b.original != c.original {
			return nil, fmt.Errorf("%s and %s have different APIs, the original's and copilot's own: name brokers of one kind", c.brokers[0].url, b.url)
		}
		c.original = b.original
	}
	if c.token, err = conf.tokenSource(); err != nil {
		return nil, err
	}
	return c, nil
}

// CloseIdleConnections closes the connections to brokers: those that are in use,
// once they are not.
func (c *Client) CloseIdleConnections() {
	for _, b := range c.brokers {
		b.http.CloseIdleConnections()
	}
}

// Original reports whether the brokers have the original's API, which only exports
// KEKs.
func (c *Client) Original() bool { return c.original }

// KEK returns the KEK named id in a version, or in its current one if version
// is 0. The original's API has no versions and always gives the current one.
// Errors wrap one of those above where they can.
func (c *Client) KEK(ctx context.Context, id string, version int) (KEK, error) {
	kek := KEK{ID: id}
	r := request{name: "key", method: http.MethodGet, path: []string{id}, original: c.original}
	accept := func(answer []byte) error {
		if err := checkSize(answer); err != nil {
			return err
		}
		kek.Key = bytes.Clone(answer)
		return nil
	}
	if !c.original {
		r.path = keyPath(id, "key")
		if version != 0 {
			r.query = url.Values{"version": {strconv.Itoa(version)}}
		} else {
			r.query = url.Values{"wraps": {strconv.Itoa(wrapsAtOnce)}}
		}
		accept = func(answer []byte) (err error) {
			kek, err = parseKEK(answer, id, version)
			return err
		}
	}
	if err := c.ask(ctx, r, accept); err != nil {
		return KEK{}, fmt.Errorf("KEK %q: %w", id, err)
	}
	return kek, nil
}

func parseKEK(answer []byte, id string, version int) (KEK, error) {
	var a struct {
		ID      string `json:"id"`
		Version int    `json:"version"`
		Key     []byte `json:"key"`
	}
	if err := decode(answer, &a); err != nil {
		return KEK{}, err
	}
	if a.ID != id || a.Version < 1 || version != 0 && a.Version != version {
		clear(a.Key)
		return KEK{}, fmt.Errorf("%w: it answered with KEK %.60q version %d, and was asked for version %d", ErrUnavailable, a.ID, a.Version, version)
	}
	if err := checkSize(a.Key); err != nil {
		clear(a.Key)
		return KEK{}, err
	}
	return KEK{ID: id, Version: a.Version, Key: a.Key}, nil
}

// Wrapped is a layer key that the broker wrapped, or is to unwrap.
type Wrapped struct {
	// Version is the KEK's, from 1.
	Version int `json:"version"`
	// Method is that of pilot's annotations: A256GCMKW for what anybody with the
	// KEK can unwrap, copilot for what only the broker can. What was wrapped for the public
	// half of a KEK has that of HPKE, and what is for the guests of Confidential Containers
	// A256GCM.
	Method string `json:"method"`
	// IV has 12 bytes, and is nil with any method but A256GCMKW and A256GCM.
	IV []byte `json:"iv,omitempty"`
	// Enc is the encapsulated key of HPKE, of 1120 bytes. Brokers return none.
	Enc []byte `json:"enc,omitempty"`
	// Key has at most 90 KiB.
	Key []byte `json:"wrappedKey"`
}

// Wrap has the broker wrap plaintext, at most 64 KiB, with the current version
// of the KEK named id. Only copilot's own API can.
func (c *Client) Wrap(ctx context.Context, id string, plaintext []byte) (Wrapped, error) {
	return c.wrap(ctx, id, keyjson.Object(keyjson.Key("plaintext", plaintext)), "")
}

// WrapCoCo is [Client.Wrap] in the form that the guests of Confidential Containers read:
// A256GCM, without additional data.
func (c *Client) WrapCoCo(ctx context.Context, id string, plaintext []byte) (Wrapped, error) {
	w, err := c.wrap(ctx, id, keyjson.Object(keyjson.Key("plaintext", plaintext), keyjson.Value("method", wireformat.MethodCoCo)), wireformat.MethodCoCo)
	if errors.Is(err, ErrRejected) {
		err = fmt.Errorf("%w: a copilot from before it knew %s rejects all such requests: is it upgraded?", err, wireformat.MethodCoCo)
	}
	return w, err
}

// wrap sends a request to wrap, which it clears. The answer has to be of the method, if that
// is not empty.
func (c *Client) wrap(ctx context.Context, id string, body []byte, method string) (w Wrapped, err error) {
	err = c.post(ctx, id, "wrap", body, func(answer []byte) error {
		var a struct {
			ID string `json:"id"`
			Wrapped
		}
		if err := decode(answer, &a); err != nil {
			return err
		}
		if a.ID != id {
			return fmt.Errorf("%w: it wrapped with KEK %.60q", ErrUnavailable, a.ID)
		}
		if w = a.Wrapped; w.Version < 1 || len(w.Key) == 0 {
			return fmt.Errorf("%w: it answered without a wrapped key", ErrUnavailable)
		}
		if method != "" && (w.Method != method || len(w.IV) != wireformat.IVSize) {
			return fmt.Errorf("%w: its wrapped key is not of method %s", ErrUnavailable, method)
		}
		if len(w.Key) > wireformat.MaxWrappedKey {
			return fmt.Errorf("%w: its wrapped key has more than %d bytes", ErrUnavailable, wireformat.MaxWrappedKey)
		}
		return nil
	})
	if err != nil {
		return Wrapped{}, fmt.Errorf("wrap with KEK %q: %w", id, err)
	}
	return w, nil
}

// Unwrap has the broker unwrap a key that it, or a client with the KEK, wrapped.
func (c *Client) Unwrap(ctx context.Context, id string, w Wrapped) (plaintext []byte, err error) {
	body, err := json.Marshal(w)
	if err != nil {
		return nil, err
	}
	err = c.post(ctx, id, "unwrap", body, func(answer []byte) error {
		var a struct {
			Plaintext []byte `json:"plaintext"`
		}
		if err := decode(answer, &a); err != nil {
			return err
		}
		if len(a.Plaintext) == 0 {
			return fmt.Errorf("%w: it answered without a key", ErrUnavailable)
		}
		plaintext = a.Plaintext
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("unwrap with KEK %q version %d: %w", id, w.Version, err)
	}
	return plaintext, nil
}

// Use asks whether the KEK named id may be used, in a version or in its current one if
// version is 0, for a workload that this node vouches for: NAMESPACE/SERVICEACCOUNT, and the
// labels of its pod, or nil if they are not known. It returns nil if so, and the keys of the
// labels that the answer depends on. The error wraps ErrForbidden, or ErrNotFound, if not. Only copilot's
// own API can.
func (c *Client) Use(ctx context.Context, id string, version int, workload string, labels map[string]string) (labelKeys []string, err error) {
	labelKeys, err = c.use(ctx, id, version, workload, labels)
	if labels != nil && errors.Is(err, ErrRejected) {
		// A copilot from before there were labels has no rules with labels either. Others
		// take labels that are not sent for ones that no rule allows.
		return c.use(ctx, id, version, workload, nil)
	}
	return labelKeys, err
}

func (c *Client) use(ctx context.Context, id string, version int, workload string, labels map[string]string) (labelKeys []string, err error) {
	body, err := json.Marshal(struct {
		Workload string            `json:"workload"`
		Labels   map[string]string `json:"labels,omitzero"`
		Version  int               `json:"version,omitempty"`
	}{workload, labels, version})
	if err != nil {
		return nil, err
	}
	err = c.post(ctx, id, "use", body, func(answer []byte) error {
		var a struct {
			ID        string   `json:"id"`
			Workload  string   `json:"workload"`
			LabelKeys []string `json:"labelKeys"`
		}
		if err := decode(answer, &a); err != nil {
			return err
		}
		if a.ID != id || a.Workload != workload {
			return fmt.Errorf("%w: it answered for KEK %.60q and workload %.60q", ErrUnavailable, a.ID, a.Workload)
		}
		labelKeys = a.LabelKeys
		return nil
	})
	if errors.Is(err, errNoSuchPath) {
		err = fmt.Errorf("a broker that knows no workloads: upgrade copilot: %w", err)
	}
	if err != nil {
		return nil, fmt.Errorf("use KEK %q for workload %s: %w", id, workload, err)
	}
	return labelKeys, nil
}

// post sends a request about a KEK to copilot's own API. It clears body.
func (c *Client) post(ctx context.Context, id, verb string, body []byte, accept func(answer []byte) error) error {
	secret := keyjson.NewBody(body)
	defer secret.Clear()
	if c.original {
		return errors.New("the original's API hands out keys only: use a broker URL without " + originalPath)
	}
	return c.ask(ctx, request{name: verb, method: http.MethodPost, path: keyPath(id, verb), body: secret}, accept)
}

func keyPath(id, verb string) []string { return []string{"api", "v2", "keks", id, verb} }

func decode(answer []byte, v any) error {
	if json.Unmarshal(answer, v) != nil {
		return fmt.Errorf("%w: it is not the JSON that copilot sends: is something else at that address?", ErrUnavailable)
	}
	return nil
}

func checkSize(key []byte) error {
	switch len(key) {
	case 16, 24, 32:
		return nil
	}
	return fmt.Errorf("%w: it is not an AES key: %d bytes, not 16, 24 or 32", ErrUnavailable, len(key))
}

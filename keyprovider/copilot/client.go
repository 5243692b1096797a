// Package copilot is the client of the key broker. It speaks copilot's own
// HTTP API and that of the original broker.
package copilot

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Errors that a caller may decide by. What is wrapped around them says which
// KEK it was about and what to do.
var (
	// ErrNotFound: the broker has no such KEK, or does not say so to us.
	ErrNotFound = errors.New("no such KEK")
	// ErrForbidden: the broker does not let us use the KEK.
	ErrForbidden = errors.New("not allowed")
	// ErrUnavailable: the broker gave no answer in time, or none that can be
	// used.
	ErrUnavailable = errors.New("the broker gives no usable answer")
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
	originalPath    = "/api/v1/key" // what the original's base URL ends in
	maxAnswer       = 128 << 10     // bytes of an answer that are read: 64 KiB in base64, and more
	defaultTimeout  = 10 * time.Second
	leastTry        = 3 * time.Second // for one try, if the whole timeout is that long
	maxErrorMessage = 300             // bytes of a broker's error message that are repeated
)

// Client asks one broker. It is safe for concurrent use.
type Client struct {
	name     string // for messages
	base     *url.URL
	original bool // the broker is the original's
	http     *http.Client
	timeout  time.Duration
	try      time.Duration
}

// New returns a client for the broker that conf describes. It does not
// connect yet.
func New(conf Config) (*Client, error) {
	base, transport, err := conf.transport()
	if err != nil {
		return nil, err
	}
	c := &Client{
		name:     conf.URL,
		base:     base,
		original: strings.HasSuffix(base.Path, originalPath),
		timeout:  conf.Timeout,
		http: &http.Client{
			Transport: transport,
			CheckRedirect: func(*http.Request, []*http.Request) error {
				return http.ErrUseLastResponse
			},
		},
	}
	if c.timeout <= 0 {
		c.timeout = defaultTimeout
	}
	c.try = min(c.timeout, max(leastTry, c.timeout/3))
	return c, nil
}

// String returns the broker's address.
func (c *Client) String() string { return "copilot at " + c.name }

// KEK returns the KEK named id in a version, or in its current one if version
// is 0. The original's API has no versions and always gives the current one.
// Errors wrap [ErrNotFound], [ErrForbidden] or [ErrUnavailable] where they can.
func (c *Client) KEK(ctx context.Context, id string, version int) (KEK, error) {
	kek, err := c.kek(ctx, id, version)
	if err != nil {
		return KEK{}, fmt.Errorf("KEK %q: %s: %w", id, c, err)
	}
	return kek, nil
}

func (c *Client) kek(ctx context.Context, id string, version int) (KEK, error) {
	if c.original {
		key, err := c.call(ctx, http.MethodGet, []string{id}, nil, nil)
		if err != nil {
			return KEK{}, err
		}
		if err := checkSize(key); err != nil {
			return KEK{}, err
		}
		return KEK{ID: id, Key: key}, nil
	}
	query := url.Values{}
	if version != 0 {
		query.Set("version", strconv.Itoa(version))
	}
	var answer struct {
		ID      string `json:"id"`
		Version int    `json:"version"`
		Key     []byte `json:"key"`
	}
	if err := c.callJSON(ctx, http.MethodGet, id, "key", query, nil, &answer); err != nil {
		return KEK{}, err
	}
	if answer.ID != id || answer.Version < 1 || version != 0 && answer.Version != version {
		return KEK{}, fmt.Errorf("%w: it answered with KEK %.60q version %d, and was asked for version %d", ErrUnavailable, answer.ID, answer.Version, version)
	}
	if err := checkSize(answer.Key); err != nil {
		return KEK{}, err
	}
	return KEK{ID: id, Version: answer.Version, Key: answer.Key}, nil
}

// Wrap has the broker wrap plaintext, at most 64 KiB, with the current version
// of the KEK named id. Only copilot's own API can.
func (c *Client) Wrap(ctx context.Context, id string, plaintext []byte) (version int, wrapped []byte, err error) {
	var answer struct {
		Version    int    `json:"version"`
		WrappedKey []byte `json:"wrappedKey"`
	}
	err = c.callJSON(ctx, http.MethodPost, id, "wrap", nil, map[string]any{"plaintext": plaintext}, &answer)
	if err == nil && (answer.Version < 1 || len(answer.WrappedKey) == 0) {
		err = fmt.Errorf("%w: it answered without a wrapped key", ErrUnavailable)
	}
	if err != nil {
		return 0, nil, fmt.Errorf("wrap with KEK %q: %s: %w", id, c, err)
	}
	return answer.Version, answer.WrappedKey, nil
}

// Unwrap has the broker unwrap what [Client.Wrap] returned.
func (c *Client) Unwrap(ctx context.Context, id string, version int, wrapped []byte) ([]byte, error) {
	var answer struct {
		Plaintext []byte `json:"plaintext"`
	}
	body := map[string]any{"version": version, "wrappedKey": wrapped}
	err := c.callJSON(ctx, http.MethodPost, id, "unwrap", nil, body, &answer)
	if err == nil && len(answer.Plaintext) == 0 {
		err = fmt.Errorf("%w: it answered without a key", ErrUnavailable)
	}
	if err != nil {
		return nil, fmt.Errorf("unwrap with KEK %q version %d: %s: %w", id, version, c, err)
	}
	return answer.Plaintext, nil
}

// callJSON calls copilot's own API.
func (c *Client) callJSON(ctx context.Context, method, id, verb string, query url.Values, body, answer any) error {
	if c.original {
		return errors.New("the original's API hands out keys only: use a broker URL without " + originalPath)
	}
	var in []byte
	if body != nil {
		var err error
		if in, err = json.Marshal(body); err != nil {
			return err
		}
		defer clear(in)
	}
	out, err := c.call(ctx, method, []string{"api", "v2", "keks", id, verb}, query, in)
	if err != nil {
		return err
	}
	defer clear(out)
	if json.Unmarshal(out, answer) != nil {
		return fmt.Errorf("%w: it is not the JSON that copilot sends: is something else at that address?", ErrUnavailable)
	}
	return nil
}

func checkSize(key []byte) error {
	switch len(key) {
	case 16, 24, 32:
		return nil
	}
	return fmt.Errorf("%w: it is no AES key: %d bytes, not 16, 24 or 32", ErrUnavailable, len(key))
}

// call makes a request, again if that may help, and returns the answer's body.
func (c *Client) call(ctx context.Context, method string, path []string, query url.Values, body []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	u := *c.base
	for _, element := range path {
		u.RawPath = u.EscapedPath() + "/" + url.PathEscape(element)
		u.Path += "/" + element
	}
	u.RawQuery = query.Encode()

	var tries backOff
	var before error
	for {
		answer, retry, err := c.once(ctx, method, u.String(), body)
		if err == nil || !retry.possible {
			return answer, err
		}
		if ctx.Err() != nil && before != nil {
			err = before // what it said tells more than that time ran out
		}
		before = err
		if !tries.wait(ctx, retry.after) {
			if !errors.Is(err, ErrUnavailable) {
				err = fmt.Errorf("%w: %w", ErrUnavailable, err)
			}
			return nil, fmt.Errorf("%w (tried %d times)", err, tries.made)
		}
	}
}

// retry says whether another try may help, and when at the earliest.
type retry struct {
	possible bool
	after    time.Duration
}

// once makes one request.
func (c *Client) once(ctx context.Context, method, u string, body []byte) ([]byte, retry, error) {
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, c.try)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, u, bytes.NewReader(body))
	if err != nil {
		return nil, retry{}, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var e *url.Error
		if errors.As(err, &e) {
			err = e.Err // without the URL, which the caller has said
		}
		if kind := permanent(err); kind != nil {
			return nil, retry{}, fmt.Errorf("%w: %w", kind, err)
		}
		if errors.Is(err, context.DeadlineExceeded) {
			err = fmt.Errorf("nothing came within %s: %w", time.Since(start).Round(10*time.Millisecond), err)
		}
		return nil, retry{possible: true}, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return nil, retry{possible: true}, fmt.Errorf("its answer breaks off: %w", err)
	case len(answer) > maxAnswer:
		return nil, retry{}, fmt.Errorf("%w: it has more than %d bytes", ErrUnavailable, maxAnswer)
	case resp.StatusCode == http.StatusOK:
		return answer, retry{}, nil
	}
	return nil, retryOf(resp), statusError(resp, answer)
}

// statusError turns an answer other than 200 into an error.
func statusError(resp *http.Response, body []byte) error {
	said := resp.Status
	var problem struct {
		Title  string `json:"title"`
		Detail string `json:"detail"`
	}
	if json.Unmarshal(body, &problem) == nil {
		if problem.Detail == ErrNotFound.Error() {
			// It is said already.
		} else if problem.Detail != "" {
			said += ": " + problem.Detail
		} else if problem.Title != "" {
			said += ": " + problem.Title
		}
	}
	said = printable(said)
	switch resp.StatusCode {
	case http.StatusNotFound:
		return fmt.Errorf("%w (%s): check the name, or create it with \"copilot keys create\"", ErrNotFound, said)
	case http.StatusUnauthorized, http.StatusForbidden:
		return fmt.Errorf("%w (%s)", ErrForbidden, said)
	}
	return fmt.Errorf("%w: it answered %s", ErrUnavailable, said)
}

// printable bounds what somebody else says and keeps it in one line.
func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == 0xfffd {
			return ' '
		}
		return r
	}, s)
	if len(s) > maxErrorMessage {
		s = strings.ToValidUTF8(s[:maxErrorMessage], "") + "…"
	}
	return s
}

package registry

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"

	"github.com/ctrlplane/pilot/internal/version"
)

const (
	// attempts is how often a request is made before it fails.
	attempts = 5
	// requestWithin bounds the wait for the answer to one request.
	requestWithin = time.Minute
	// longestPause bounds the wait before a request is made again, whatever the
	// registry asks for.
	longestPause = 30 * time.Second
)

// host makes requests about a repository to one of its registry's hosts.
type host struct {
	docker.RegistryHost
	repository string // as in library/app
	namespace  string // the registry that the host stands for, or ""
	// fellBack says that the client speaks http with a host configured as https, as
	// containerd's does with a registry on localhost.
	fellBack atomic.Bool
}

// url returns the URL of something in the repository.
func (h *host) url(query url.Values, elements ...string) *url.URL {
	u := &url.URL{Scheme: h.Scheme, Host: h.Host, Path: path.Join(append([]string{"/", h.Path, h.repository}, elements...)...)}
	if strings.HasSuffix(elements[len(elements)-1], "/") {
		u.Path += "/"
	}
	if h.namespace != "" {
		if query = maps.Clone(query); query == nil {
			query = url.Values{}
		}
		query.Set("ns", h.namespace)
	}
	u.RawQuery = query.Encode()
	return u
}

// request is one that can be made again.
type request struct {
	method string
	url    *url.URL
	header http.Header
	body   []byte
	// once says that the request must not be made again after it may have had an
	// effect.
	once bool
	// attempts is how often the request is made before it fails, or attempts if it is 0.
	attempts int
	// within bounds one attempt, or requestWithin if it is 0.
	within time.Duration
	// most is how many bytes of the answer are read, or maxAnswer if it is 0.
	most int64
}

// do makes a request until it is answered. The answer's body is read and closed: want
// lists the statuses of success, of which the answer is returned; others are an [Error]
// that wraps a [remoteerrors.ErrUnexpectedStatus], and [errdefs.ErrNotFound] if it is that.
func (h *host) do(ctx context.Context, r request, want ...int) (_ *http.Response, err error) {
	defer func() { err = plainly(h.Host, err) }()
	var answers []*http.Response // that the authorizer has not seen
	refused := false
	last := cmp.Or(r.attempts, attempts)
	for n := 1; ; n++ {
		resp, err := h.once(ctx, r)
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case err != nil:
			if n == last || r.once {
				return nil, err
			}
		case slices.Contains(want, resp.StatusCode):
			return resp, nil
		case resp.StatusCode == http.StatusUnauthorized && !refused && h.authorizes(resp.Request.URL):
			refused = true
			answers = append(answers, resp)
			if err := h.Authorizer.AddResponses(ctx, answers); err == nil {
				continue
			} else if !errdefs.IsNotImplemented(err) {
				return nil, err
			}
			return nil, statusError(resp)
		case n == last || r.once && resp.StatusCode != http.StatusTooManyRequests || !transient(resp.StatusCode):
			return nil, statusError(resp)
		}
		if err := pause(ctx, n, resp); err != nil {
			return nil, err
		}
	}
}

// transient reports whether a request that was answered so may succeed later.
func transient(status int) bool {
	switch status {
	case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusInternalServerError,
		http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return false
}

// pause waits before attempt n+1, as long as the registry asks for within reason.
func pause(ctx context.Context, n int, resp *http.Response) error {
	wait := time.Duration(1<<n) * 100 * time.Millisecond
	wait += rand.N(wait)
	if resp != nil {
		if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && s > 0 {
			wait = time.Duration(min(s, int(longestPause/time.Second))) * time.Second
		}
	}
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(wait):
		return nil
	}
}

// authorizes reports whether the host's credentials are for u: an upload may be at
// another host, which must not see them.
func (h *host) authorizes(u *url.URL) bool { return h.Authorizer != nil && h.is(u) }

// is reports whether u is at the host.
func (h *host) is(u *url.URL) bool {
	return u.Host == h.Host && (u.Scheme == h.Scheme || u.Scheme == "http" && h.fellBack.Load())
}

// once makes one attempt. The answer's body is in memory.
func (h *host) once(ctx context.Context, r request) (_ *http.Response, err error) {
	within := r.within
	if within == 0 {
		within = requestWithin
	}
	ctx, cancel := context.WithTimeoutCause(ctx, within, fmt.Errorf("%s gave no answer within %v", h.Host, within))
	defer cancel()
	defer func() {
		if err != nil && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
	}()
	lent := &lentBytes{b: r.body}
	defer lent.takeBack()
	resp, err := h.send(ctx, r.method, r.url, r.header, lent.reader(), int64(len(r.body)))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	most := max(r.most, maxAnswer)
	body, err := io.ReadAll(io.LimitReader(resp.Body, most))
	if err != nil && resp.StatusCode < 300 {
		return nil, err
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return resp, nil
}

// maxAnswer bounds what is read of an answer, in bytes: an error, or nothing.
const maxAnswer = 64 << 10

// send sends a request with a body of size bytes, or -1 if that is not known.
func (h *host) send(ctx context.Context, method string, u *url.URL, header http.Header, body io.Reader, size int64) (*http.Response, error) {
	if h.Scheme == "https" && u.Scheme != "https" && !h.is(u) {
		return nil, fmt.Errorf("%s sends uploads to %s://%s, which is not encrypted: its own address in its configuration may lack https", h.Host, u.Scheme, u.Host)
	}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, err
	}
	if lent, ok := body.(*lentReader); ok {
		req.GetBody = func() (io.ReadCloser, error) { return &lentReader{lent: lent.lent}, nil }
	}
	if h.is(u) { // the configured headers may be credentials
		for name, values := range h.Header {
			req.Header[name] = append(req.Header[name], values...)
		}
	}
	for name, values := range header {
		req.Header[name] = values
	}
	req.Header.Set("User-Agent", "ctr-pilot/"+version.Version)
	req.ContentLength = size
	if h.authorizes(u) {
		if err := h.Authorizer.Authorize(ctx, req); err != nil {
			return nil, err
		}
	}
	client := h.Client
	if client == nil {
		client = http.DefaultClient
	}
	resp, err := client.Do(req)
	if err == nil && u.Scheme == "https" && resp.Request.URL.Scheme == "http" && resp.Request.URL.Host == h.Host {
		h.fellBack.Store(true)
	}
	return resp, plainly(h.Host, err)
}

// statusError returns the error of an answer that is not a success.
func statusError(resp *http.Response) error {
	shown := *resp.Request.URL
	shown.RawQuery = ""
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	err := error(remoteerrors.ErrUnexpectedStatus{
		Status: resp.Status, StatusCode: resp.StatusCode, Body: body,
		RequestURL: shown.String(), RequestMethod: resp.Request.Method,
	})
	if resp.StatusCode == http.StatusNotFound {
		err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return err
}

// lentBytes is the body of a request, until it is taken back: Go's client may go on
// reading a body after it has returned an early answer.
type lentBytes struct {
	mu   sync.Mutex
	b    []byte
	back bool
}

// reader returns a reader from the beginning.
func (l *lentBytes) reader() io.Reader {
	if len(l.b) == 0 {
		return http.NoBody
	}
	return &lentReader{lent: l}
}

// takeBack ends all readers.
func (l *lentBytes) takeBack() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b, l.back = nil, true
}

type lentReader struct {
	lent *lentBytes
	off  int
}

func (r *lentReader) Read(p []byte) (int, error) {
	r.lent.mu.Lock()
	defer r.lent.mu.Unlock()
	switch {
	case r.lent.back:
		return 0, errors.New("the request has ended")
	case r.off == len(r.lent.b):
		return 0, io.EOF
	}
	n := copy(p, r.lent.b[r.off:])
	r.off += n
	return n, nil
}

func (r *lentReader) Close() error { return nil }

// statusOf returns the HTTP status that an error is about, or 0.
func statusOf(err error) int {
	if status, ok := errors.AsType[remoteerrors.ErrUnexpectedStatus](err); ok {
		return status.StatusCode
	}
	return 0
}

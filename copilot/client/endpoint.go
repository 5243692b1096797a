package client

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strings"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/keyjson"
)

// endpoint is the broker at one address.
type endpoint struct {
	url  string // for messages
	base *url.URL
	http *http.Client
	cert *certfile.Pair // to show it; may be nil

	original bool // it has the original's API
	health
}

// String returns the broker's address.
func (b *endpoint) String() string { return "copilot at " + b.url }

// request is what a broker is asked for.
type request struct {
	name          string // for traces
	method        string
	path          []string // elements below the broker's base URL
	query         url.Values
	body          *keyjson.Body
	authorization string // may be empty
	original      bool   // it is of the original's API
	byCertificate bool   // it shows no token
}

// target returns the URL of a request.
func (b *endpoint) target(r request) string {
	u := *b.base
	for _, element := range r.path {
		u.RawPath = u.EscapedPath() + "/" + url.PathEscape(element)
		u.Path += "/" + element
	}
	u.RawQuery = r.query.Encode()
	return u.String()
}

// retry says whether another try may help, and when at the earliest.
type retry struct {
	possible bool
	after    time.Duration
}

// once makes a request, passes the answer to accept, and clears it.
func (b *endpoint) once(ctx context.Context, within time.Duration, r request, accept func(answer []byte) error) (_ retry, err error) {
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	ctx, span := startSpan(ctx, b, r)
	defer func() { endSpan(span, err) }()
	req, err := http.NewRequestWithContext(ctx, r.method, b.target(r), nil)
	if err != nil {
		return retry{}, err
	}
	if r.body != nil {
		req.Body, req.ContentLength = r.body.Reader(), int64(r.body.Len())
		// A broker that closes the connection may not have started on this request.
		req.GetBody = func() (io.ReadCloser, error) { return r.body.Reader(), nil }
		req.Header.Set("Content-Type", "application/json")
	}
	req, unused := watchUse(req)
	passOn(ctx, req.Header)
	if r.authorization != "" {
		req.Header.Set("Authorization", r.authorization)
	}
	resp, err := b.http.Do(req)
	if err != nil {
		err = withoutURL(err)
		if expired := b.expired(); expired != nil {
			return retry{}, fmt.Errorf("%w: %w: %w", ErrUnavailable, expired, err)
		}
		if kind := permanent(err, b.cert != nil); kind != nil {
			return retry{}, fmt.Errorf("%w: %w", kind, err)
		}
		if errors.Is(err, context.DeadlineExceeded) {
			err = fmt.Errorf("no response within %s: %w", time.Since(start).Round(10*time.Millisecond), err)
		}
		if b.cert != nil && unused.Load() {
			// A broker that refuses a certificate may hang up before its reason is read.
			err = fmt.Errorf("it closed the connection at once, as a broker does that rejects broker-cert: %w", err)
		}
		return retry{possible: true}, err
	}
	defer resp.Body.Close()
	answer, err := keyjson.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	defer clear(answer)
	switch {
	case err != nil:
		return retry{possible: true}, fmt.Errorf("its response was cut short: %w", err)
	case len(answer) > maxAnswer:
		return retry{possible: true}, fmt.Errorf("%w: it has more than %d bytes", ErrUnavailable, maxAnswer)
	}
	again, err := r.check(resp, answer, accept)
	if expired := b.expired(); expired != nil && resp.StatusCode == http.StatusUnauthorized {
		err = fmt.Errorf("%w: %w", expired, err)
	}
	return again, err
}

// watchUse returns a request that notes whether the last connection that it got ended
// before the request was on it.
func watchUse(req *http.Request) (*http.Request, *atomic.Bool) {
	unused := new(atomic.Bool)
	return req.WithContext(httptrace.WithClientTrace(req.Context(), &httptrace.ClientTrace{
		GotConn:      func(httptrace.GotConnInfo) { unused.Store(true) },
		WroteHeaders: func() { unused.Store(false) },
	})), unused
}

// expired returns an error if the certificate to show has expired, or is not valid
// yet. A broker that refuses it may hang up before its reason is read.
func (b *endpoint) expired() error {
	if b.cert == nil {
		return nil
	}
	return checkTime(b.cert.Certificate().Leaf)
}

// checkTime returns an error that wraps [ErrCertExpired] or [ErrCertNotYetValid]
// unless it is the certificate's time.
func checkTime(cert *x509.Certificate) error {
	switch now := time.Now(); {
	case now.After(cert.NotAfter):
		return fmt.Errorf("%w on %s: renew it (\"copilot certs renew\")", ErrCertExpired, cert.NotAfter.Format(time.RFC3339))
	case now.Before(cert.NotBefore):
		return fmt.Errorf("%w, but from %s: compare the clocks of this machine and the broker", ErrCertNotYetValid, cert.NotBefore.Format(time.RFC3339))
	}
	return nil
}

// withoutURL returns an HTTP client's error without the URL, which the caller adds.
func withoutURL(err error) error {
	if e := new(url.Error); errors.As(err, &e) {
		return e.Err
	}
	return err
}

// printable returns untrusted text as one line of bounded length.
func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) || r == utf8.RuneError {
			return ' '
		}
		return r
	}, s)
	if len(s) > maxErrorMessage {
		s = strings.ToValidUTF8(s[:maxErrorMessage], "") + "…"
	}
	return s
}

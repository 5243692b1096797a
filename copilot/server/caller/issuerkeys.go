package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"

	"github.com/ctrlplane/pilot/internal/loopback"
)

// maxIssuerAnswer bounds what an issuer answers, in bytes.
const maxIssuerAnswer = 1 << 20

// keysTTL is how long an issuer's keys are not fetched again: tokens that name an
// unknown key would have copilot fetch them for each request.
const keysTTL = 5 * time.Second

// errIssuer is the error of keys that can't be had.
var errIssuer = errors.New("the keys of the token's issuer can't be had")

// issuerTransport asks an issuer, and nobody else: neither its configuration nor a
// redirect leads to another host, or away from TLS. What it answered counts for
// keysTTL. Errors wrap [errIssuer].
type issuerTransport struct {
	http.RoundTripper
	hosts []string // as in URLs

	mu     sync.Mutex
	recent map[string]*issuerAnswer // by URL
}

type issuerAnswer struct {
	at     time.Time
	header http.Header
	body   []byte
}

func newIssuerTransport(next http.RoundTripper, urls ...string) *issuerTransport {
	t := &issuerTransport{RoundTripper: next, recent: make(map[string]*issuerAnswer)}
	for _, u := range urls {
		if parsed, err := url.Parse(u); err == nil && u != "" {
			t.hosts = append(t.hosts, parsed.Host)
		}
	}
	return t
}

func (t *issuerTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if !t.trusts(r.URL) {
		return nil, fmt.Errorf("%w: it leads to %s://%s, which is not the issuer's host: set keys-url if that is right", errIssuer, r.URL.Scheme, r.URL.Host)
	}
	t.mu.Lock()
	a := t.recent[r.URL.String()]
	t.mu.Unlock()
	if a != nil && time.Since(a.at) < keysTTL {
		return a.response(r), nil
	}
	resp, err := t.RoundTripper.RoundTrip(r)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errIssuer, err)
	}
	if resp.StatusCode >= 300 && resp.StatusCode < 400 {
		return resp, nil // http.Client asks this again for where it leads
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxIssuerAnswer+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: %w", errIssuer, err)
	case resp.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("%w: %s: %.200q", errIssuer, resp.Status, body)
	case len(body) > maxIssuerAnswer:
		return nil, fmt.Errorf("%w: its answer has more than %d bytes", errIssuer, maxIssuerAnswer)
	case !json.Valid(body):
		return nil, fmt.Errorf("%w: its answer is not JSON", errIssuer)
	}
	a = &issuerAnswer{time.Now(), resp.Header, body}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.recent) > 10 { // an issuer has two URLs
		clear(t.recent)
	}
	t.recent[r.URL.String()] = a
	return a.response(r), nil
}

func (t *issuerTransport) trusts(u *url.URL) bool {
	if u.Scheme != "https" && !(u.Scheme == "http" && loopback.Is(u.Hostname())) {
		return false
	}
	return slices.ContainsFunc(t.hosts, func(host string) bool { return strings.EqualFold(u.Host, host) })
}

func (a *issuerAnswer) response(r *http.Request) *http.Response {
	return &http.Response{
		Status: "200 OK", StatusCode: http.StatusOK, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: a.header.Clone(), Body: io.NopCloser(bytes.NewReader(a.body)), ContentLength: int64(len(a.body)), Request: r,
	}
}

// fetchKey is the context key of a *error, the one of a fetch of keys.
type fetchKey struct{}

// noticingKeys notes in the context that the keys could not be had: go-oidc's
// verifier keeps only the text of such an error.
type noticingKeys struct{ oidc.KeySet }

func (k noticingKeys) VerifySignature(ctx context.Context, token string) ([]byte, error) {
	payload, err := k.KeySet.VerifySignature(ctx, token)
	if slot, ok := ctx.Value(fetchKey{}).(*error); ok && (errors.Is(err, errIssuer) || err != nil && ctx.Err() != nil) {
		*slot = err
	}
	return payload, err
}

// checkClaims refuses a token of which a claim is there twice, or differs in case
// only from one that counts: programs disagree about which of two counts.
func checkClaims(payload []byte) error {
	d := json.NewDecoder(bytes.NewReader(payload))
	if start, err := d.Token(); err != nil || start != json.Delim('{') {
		return errors.New("its claims are not a JSON object")
	}
	seen := make(map[string]bool)
	for d.More() {
		token, err := d.Token()
		if err != nil {
			return errors.New("its claims are not JSON")
		}
		name := token.(string)
		// As encoding/json compares names: it takes U+017F for an s, and U+212A for a k.
		folded := strings.ToLower(strings.ToUpper(name))
		if seen[folded] {
			return fmt.Errorf("it has two claims %.50q", folded)
		}
		seen[folded] = true
		if name != folded && slices.Contains([]string{"iss", "sub", "aud", "exp", "nbf", "iat"}, folded) {
			return fmt.Errorf("its claim %q is spelled %q", folded, name)
		}
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return errors.New("its claims are not JSON")
		}
	}
	return nil
}

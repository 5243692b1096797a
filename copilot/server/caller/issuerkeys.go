package caller

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

	"github.com/ctrlplane/pilot/internal/jwks"
	"github.com/ctrlplane/pilot/internal/loopback"
)

// maxIssuerAnswer bounds what an issuer answers, in bytes.
const maxIssuerAnswer = 1 << 20

// keysTTL is how long an issuer's keys are not fetched again. Otherwise tokens that name
// unknown keys would make copilot fetch them for each request.
const keysTTL = 5 * time.Second

// keysMaxAge is how long an issuer's keys count without being fetched again: go-oidc fetches
// them only for a token that none of them fits, and trusts one that was withdrawn till then.
const keysMaxAge = 10 * time.Minute

// ErrIssuer is the error of a token whose issuer's keys can't be fetched.
var ErrIssuer = errors.New("can't fetch the keys of the token's issuer")

// issuerTransport sends requests to an issuer's own hosts only: neither its
// configuration nor a redirect leads to another host, or away from TLS. Responses are
// cached for keysTTL. Errors wrap [ErrIssuer].
type issuerTransport struct {
	http.RoundTripper
	hosts []string // as in URLs

	mu     sync.Mutex
	recent map[string]*issuerResponse // by URL
}

type issuerResponse struct {
	at     time.Time
	header http.Header
	body   []byte
}

func newIssuerTransport(next http.RoundTripper, urls ...string) *issuerTransport {
	t := &issuerTransport{RoundTripper: next, recent: make(map[string]*issuerResponse)}
	for _, u := range urls {
		if parsed, err := url.Parse(u); err == nil && u != "" {
			t.hosts = append(t.hosts, parsed.Host)
		}
	}
	return t
}

func (t *issuerTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if !t.trusts(r.URL) {
		return nil, fmt.Errorf("%w: the issuer refers to %s://%s, which is not its own host: set keys-url if that is right", ErrIssuer, r.URL.Scheme, r.URL.Host)
	}
	t.mu.Lock()
	a := t.recent[r.URL.String()]
	t.mu.Unlock()
	if a != nil && time.Since(a.at) < keysTTL {
		return a.response(r), nil
	}
	resp, err := t.RoundTripper.RoundTrip(r)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrIssuer, err)
	}
	if resp.StatusCode >= 300 && resp.StatusCode < 400 {
		return resp, nil // http.Client follows it through this transport again
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxIssuerAnswer+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrIssuer, err)
	case resp.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("%w: %s: %.200q", ErrIssuer, resp.Status, body)
	case len(body) > maxIssuerAnswer:
		return nil, fmt.Errorf("%w: the response is larger than %d bytes", ErrIssuer, maxIssuerAnswer)
	case !json.Valid(body):
		return nil, fmt.Errorf("%w: the response is not JSON", ErrIssuer)
	}
	a = &issuerResponse{time.Now(), resp.Header, jwks.WithoutCertificates(body)}
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

func (a *issuerResponse) response(r *http.Request) *http.Response {
	return &http.Response{
		Status: "200 OK", StatusCode: http.StatusOK, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: a.header.Clone(), Body: io.NopCloser(bytes.NewReader(a.body)), ContentLength: int64(len(a.body)), Request: r,
	}
}

// fetchKey is the context key of a *error for the error of fetching keys.
type fetchKey struct{}

// reportingKeys reports errors of fetching keys through the context: go-oidc's verifier
// keeps only the text of such an error.
type reportingKeys struct{ oidc.KeySet }

func (k reportingKeys) VerifySignature(ctx context.Context, token string) ([]byte, error) {
	payload, err := k.KeySet.VerifySignature(ctx, token)
	if slot, ok := ctx.Value(fetchKey{}).(*error); ok && (errors.Is(err, ErrIssuer) || err != nil && ctx.Err() != nil) {
		*slot = err
	}
	return payload, err
}

// freshKeys are the keys at a URL, as they were there within keysMaxAge. While they can't be
// fetched, the ones before count.
type freshKeys struct {
	ctx context.Context // with the client, for [oidc.NewRemoteKeySet]
	url string

	mu  sync.Mutex
	set oidc.KeySet
	due time.Time // to be fetched again
}

func newFreshKeys(ctx context.Context, url string) *freshKeys {
	return &freshKeys{ctx: ctx, url: url, set: oidc.NewRemoteKeySet(ctx, url), due: time.Now().Add(keysMaxAge)}
}

func (k *freshKeys) VerifySignature(ctx context.Context, token string) ([]byte, error) {
	now := time.Now()
	k.mu.Lock()
	set, due := k.set, now.After(k.due)
	if due {
		k.due = now.Add(keysTTL) // meanwhile, other tokens are verified as before
	}
	k.mu.Unlock()
	if !due {
		return set.VerifySignature(ctx, token)
	}
	fresh := oidc.NewRemoteKeySet(k.ctx, k.url)
	payload, err := fresh.VerifySignature(ctx, token)
	if errors.Is(err, ErrIssuer) || err != nil && ctx.Err() != nil {
		return set.VerifySignature(ctx, token)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.set, k.due = fresh, now.Add(keysMaxAge)
	return payload, err
}

// checkClaims rejects a token with duplicate claims, or with one that differs from a
// standard claim in case only: parsers disagree about which of two is used.
func checkClaims(payload []byte) error {
	d := json.NewDecoder(bytes.NewReader(payload))
	if start, err := d.Token(); err != nil || start != json.Delim('{') {
		return errors.New("the claims are not a JSON object")
	}
	seen := make(map[string]bool)
	for d.More() {
		token, err := d.Token()
		if err != nil {
			return errors.New("the claims are not JSON")
		}
		name := token.(string)
		// As encoding/json compares names: it takes U+017F for an s, and U+212A for a k.
		folded := strings.ToLower(strings.ToUpper(name))
		if seen[folded] {
			return fmt.Errorf("duplicate claim %.50q", folded)
		}
		seen[folded] = true
		if name != folded && slices.Contains([]string{"iss", "sub", "aud", "exp", "nbf", "iat"}, folded) {
			return fmt.Errorf("claim %q is spelled %q", folded, name)
		}
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return errors.New("the claims are not JSON")
		}
	}
	return nil
}

package server

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/sync/singleflight"

	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/regular"
)

const (
	// maxToken bounds a bearer token, in bytes.
	maxToken = 16 << 10
	// failedFor is how long an issuer is not asked again that gave no answer.
	failedFor = 5 * time.Second
	// issuerWithin bounds the wait for an issuer's keys.
	issuerWithin = 5 * time.Second
)

// issuers checks bearer tokens.
type issuers struct {
	byURL map[string]*issuer
}

// names returns the issuers' names.
func (all *issuers) names() []string {
	names := []string{}
	for _, i := range all.byURL {
		names = append(names, i.name)
	}
	return names
}

// issuer is one OpenID Connect issuer. It is asked for its keys when a token of
// its comes, so a broker starts while it is down.
type issuer struct {
	name   string
	conf   Issuer
	client *http.Client

	flight singleflight.Group

	mu       sync.Mutex
	verifier *oidc.IDTokenVerifier
	failure  error // when it was asked last
	failed   time.Time
}

func newIssuers(conf map[string]Issuer) (*issuers, error) {
	all := &issuers{make(map[string]*issuer)}
	for name, c := range conf {
		if other, ok := all.byURL[c.URL]; ok {
			return nil, fmt.Errorf("issuers %s and %s have the same url", other.name, name)
		}
		transport := &http.Transport{Proxy: http.ProxyFromEnvironment, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12}, MaxResponseHeaderBytes: 64 << 10}
		if c.CA != "" {
			pool, err := certfile.Pool(c.CA)
			if err != nil {
				return nil, fmt.Errorf("issuers.%s: ca: %w", name, err)
			}
			transport.TLSClientConfig.RootCAs = pool
		}
		all.byURL[c.URL] = &issuer{name: name, conf: c, client: &http.Client{
			Timeout:   issuerWithin,
			Transport: newIssuerTransport(withToken{transport, c.TokenFile}, c.URL, c.KeysURL),
		}}
	}
	return all, nil
}

// withToken shows the issuer a token, which is read anew each time.
type withToken struct {
	http.RoundTripper
	file string
}

func (t withToken) RoundTrip(r *http.Request) (*http.Response, error) {
	if t.file != "" {
		b, err := regular.Read(t.file, maxToken)
		if err != nil {
			return nil, err
		}
		r = r.Clone(r.Context())
		r.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(b)))
	}
	return t.RoundTripper.RoundTrip(r)
}

// identity returns who a token tells: the issuer's name, a colon, and the
// token's subject.
func (all *issuers) identity(ctx context.Context, token string) (string, error) {
	if len(token) > maxToken {
		return "", fmt.Errorf("the token has more than %d bytes", maxToken)
	}
	url, err := issuerOf(token)
	if err != nil {
		return "", err
	}
	i, ok := all.byURL[url]
	if !ok {
		return "", fmt.Errorf("the token comes from the issuer %.200q, which is not one of the broker's", url)
	}
	verifier, err := i.get(ctx)
	if err != nil {
		if !errors.Is(err, errIssuer) {
			err = fmt.Errorf("%w: %w", errIssuer, err)
		}
		return "", fmt.Errorf("issuer %s: %w", i.name, err)
	}
	var unfetched error
	verified, err := verifier.Verify(context.WithValue(oidc.ClientContext(ctx, i.client), fetchKey{}, &unfetched), token)
	if unfetched != nil {
		if !errors.Is(unfetched, errIssuer) {
			unfetched = fmt.Errorf("%w: %w", errIssuer, unfetched)
		}
		return "", fmt.Errorf("issuer %s: %w", i.name, unfetched)
	}
	if err != nil {
		return "", fmt.Errorf("token of issuer %s: %s", i.name, withoutPrefix(err))
	}
	if verified.Subject == "" {
		return "", fmt.Errorf("token of issuer %s: it has no subject", i.name)
	}
	return i.name + ":" + verified.Subject, nil
}

func withoutPrefix(err error) string { return strings.TrimPrefix(err.Error(), "oidc: ") }

// issuerOf returns what a token that is not verified yet says of its issuer.
func issuerOf(token string) (string, error) {
	var claims struct {
		Issuer string `json:"iss"`
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return "", errors.New("the bearer token is no JSON web token")
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || json.Unmarshal(b, &claims) != nil {
		return "", errors.New("the bearer token is no JSON web token")
	}
	if err := checkClaims(b); err != nil {
		return "", fmt.Errorf("the bearer token can't be used: %w", err)
	}
	return claims.Issuer, nil
}

// get returns what verifies the issuer's tokens. However many ask at once, the
// issuer is asked once, and each stops waiting when its own ctx is done.
func (i *issuer) get(ctx context.Context) (*oidc.IDTokenVerifier, error) {
	i.mu.Lock()
	verifier, failure, failed := i.verifier, i.failure, i.failed
	i.mu.Unlock()
	if verifier != nil {
		return verifier, nil
	}
	if failure != nil && time.Since(failed) < failedFor {
		return nil, failure
	}
	// The keys are fetched later, too, so not in the request's context.
	shared := oidc.ClientContext(context.WithoutCancel(ctx), i.client)
	found := i.flight.DoChan("", func() (any, error) {
		verifier, err := i.discover(shared)
		i.mu.Lock()
		defer i.mu.Unlock()
		i.verifier, i.failure, i.failed = verifier, err, time.Now()
		return verifier, err
	})
	select {
	case r := <-found:
		return r.Val.(*oidc.IDTokenVerifier), r.Err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// signingAlgorithms are those with public keys: an issuer's are public.
var signingAlgorithms = []string{oidc.RS256, oidc.RS384, oidc.RS512, oidc.ES256, oidc.ES384, oidc.ES512, oidc.PS256, oidc.PS384, oidc.PS512, oidc.EdDSA}

func (i *issuer) discover(ctx context.Context) (*oidc.IDTokenVerifier, error) {
	conf := &oidc.Config{ClientID: i.conf.Audience}
	if i.conf.KeysURL != "" {
		conf.SupportedSigningAlgs = signingAlgorithms
		return oidc.NewVerifier(i.conf.URL, noticingKeys{oidc.NewRemoteKeySet(ctx, i.conf.KeysURL)}, conf), nil
	}
	provider, err := oidc.NewProvider(ctx, i.conf.URL)
	if err != nil {
		return nil, err
	}
	var metadata struct {
		KeysURL    string   `json:"jwks_uri"`
		Algorithms []string `json:"id_token_signing_alg_values_supported"`
	}
	if err := provider.Claims(&metadata); err != nil {
		return nil, err
	}
	for _, alg := range metadata.Algorithms {
		if slices.Contains(signingAlgorithms, alg) {
			conf.SupportedSigningAlgs = append(conf.SupportedSigningAlgs, alg)
		}
	}
	return oidc.NewVerifier(i.conf.URL, noticingKeys{oidc.NewRemoteKeySet(ctx, metadata.KeysURL)}, conf), nil
}

package caller

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/sync/singleflight"

	"github.com/ctrlplane/pilot/copilot/policy"
	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/loopback"
	"github.com/ctrlplane/pilot/internal/regular"
)

const (
	// MaxToken bounds a bearer token, in bytes.
	MaxToken = 16 << 10
	// failureTTL is how long after a failed discovery an issuer is not asked again.
	failureTTL = 5 * time.Second
	// issuerTimeout bounds the wait for an issuer's keys.
	issuerTimeout = 5 * time.Second
)

// Issuer configures an OpenID Connect issuer whose tokens are accepted.
type Issuer struct {
	// URL is the issuer, as in the iss claim of its tokens.
	URL string `toml:"url"`
	// Audience is the audience that tokens must have.
	Audience string `toml:"audience"`
	// CA is a PEM file with the CAs to trust when connecting to the issuer. Default: the
	// system's.
	CA string `toml:"ca"`
	// TokenFile holds a bearer token to show the issuer when fetching its keys, which
	// Kubernetes requires by default.
	TokenFile string `toml:"token-file"`
	// KeysURL is where the keys are. Default: the jwks_uri of the issuer's
	// /.well-known/openid-configuration.
	KeysURL string `toml:"keys-url"`
	// NodesURL is where a Kubernetes API server has its nodes, as in
	// https://kubernetes.default.svc.cluster.local/api/v1/nodes. A token that names a node
	// then has to come from one of its addresses. Default: from anywhere.
	NodesURL string `toml:"nodes-url"`
}

// Check validates an issuer's settings. Its name is the prefix of the identities of its
// tokens.
func (i Issuer) Check(name string) error {
	if slices.Contains([]string{"spiffe", "dns", "cn", "uid", Anonymous, ""}, name) || strings.ContainsAny(name, ":/*") {
		return errors.New("the name can't be used: it begins other identities, or has one of :/*")
	}
	if i.URL == "" || i.Audience == "" {
		return errors.New("url and audience are required")
	}
	for _, u := range []string{i.URL, i.KeysURL, i.NodesURL} {
		if u == "" {
			continue
		}
		parsed, err := url.Parse(u)
		if err != nil || parsed.Scheme != "https" && !(parsed.Scheme == "http" && loopback.Is(parsed.Hostname())) {
			return fmt.Errorf("%s: what is fetched without TLS could be anybody's: use https", u)
		}
	}
	return nil
}

// Issuers verifies bearer tokens. It is safe for concurrent use.
type Issuers struct {
	byURL map[string]*issuer
}

// issuer is one OpenID Connect issuer. Its keys are fetched when the first of its tokens
// arrives, so the broker starts while the issuer is down.
type issuer struct {
	name   string
	conf   Issuer
	client *http.Client
	nodes  *nodes // nil without NodesURL

	flight singleflight.Group

	mu       sync.Mutex
	verifier *oidc.IDTokenVerifier
	failure  error // of the last discovery
	failed   time.Time
}

// NewIssuers returns the issuers of a configuration, by name. It fetches nothing.
func NewIssuers(conf map[string]Issuer) (*Issuers, error) {
	all := &Issuers{make(map[string]*issuer)}
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
		shown := withToken{transport, c.TokenFile}
		i := &issuer{name: name, conf: c, client: &http.Client{Timeout: issuerTimeout, Transport: newIssuerTransport(shown, c.URL, c.KeysURL)}}
		if c.NodesURL != "" {
			i.nodes = &nodes{url: c.NodesURL, client: &http.Client{
				Timeout: issuerTimeout, Transport: shown,
				CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
			}}
		}
		all.byURL[c.URL] = i
	}
	return all, nil
}

// Names returns the issuers' names, in no order.
func (all *Issuers) Names() []string {
	names := []string{}
	for _, i := range all.byURL {
		names = append(names, i.name)
	}
	return names
}

// withToken shows the issuer a bearer token, which is read from its file each time.
type withToken struct {
	http.RoundTripper
	file string
}

func (t withToken) RoundTrip(r *http.Request) (*http.Response, error) {
	if t.file != "" {
		b, err := regular.Read(t.file, MaxToken)
		if err != nil {
			return nil, err
		}
		r = r.Clone(r.Context())
		r.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(b)))
	}
	return t.RoundTripper.RoundTrip(r)
}

// verify verifies a token, and returns who it is for: the issuer's name, a colon and the
// token's subject, with its node if it has one, and its claims. The token was shown from an
// address, HOST:PORT.
func (all *Issuers) verify(ctx context.Context, token, address string) (who policy.Principal, err error) {
	claimed, err := issuerOf(token)
	if err != nil {
		return who, err
	}
	i, ok := all.byURL[claimed]
	if !ok {
		return who, fmt.Errorf("the token is from issuer %.200q, which is not configured in this broker", claimed)
	}
	verifier, err := i.get(ctx)
	if err != nil {
		if !errors.Is(err, ErrIssuer) {
			err = fmt.Errorf("%w: %w", ErrIssuer, err)
		}
		return who, fmt.Errorf("issuer %s: %w", i.name, err)
	}
	var unfetched error
	verified, err := verifier.Verify(context.WithValue(oidc.ClientContext(ctx, i.client), fetchKey{}, &unfetched), token)
	if unfetched != nil {
		if !errors.Is(unfetched, ErrIssuer) {
			unfetched = fmt.Errorf("%w: %w", ErrIssuer, unfetched)
		}
		return who, fmt.Errorf("issuer %s: %w", i.name, unfetched)
	}
	if err != nil {
		return who, fmt.Errorf("token of issuer %s: %w", i.name, err)
	}
	if verified.Subject == "" {
		return who, fmt.Errorf("token of issuer %s: it has no subject", i.name)
	}
	var payload json.RawMessage
	if err := verified.Claims(&payload); err != nil {
		return who, fmt.Errorf("token of issuer %s: %w", i.name, err)
	}
	if who, err = principal(i.name, verified.Subject, payload); err != nil {
		return who, fmt.Errorf("token of issuer %s: %w", i.name, err)
	}
	if node := nodeOf(payload); i.nodes != nil && policy.Group(who.Identity) != "" {
		if err := i.nodes.check(ctx, node, address); err != nil {
			return who, fmt.Errorf("token of issuer %s: %w", i.name, err)
		}
	}
	return who, nil
}

// principal returns who a token is for.
func principal(issuer, subject string, payload []byte) (who policy.Principal, err error) {
	if who.Claims, err = policy.ParseClaims(payload); err != nil {
		return who, err
	}
	who.Identity, err = policy.TokenIdentity(issuer, subject, nodeOf(payload))
	return who, err
}

// nodeOf returns the node of the pod, or the node, that a token of Kubernetes 1.30 or later
// is bound to, or "".
func nodeOf(payload []byte) string {
	var claims struct {
		Kubernetes json.RawMessage `json:"kubernetes.io"`
	}
	var bound struct {
		Node struct {
			Name string `json:"name"`
		} `json:"node"`
	}
	if json.Unmarshal(payload, &claims) != nil || json.Unmarshal(claims.Kubernetes, &bound) != nil {
		return "" // an issuer that is no Kubernetes
	}
	return bound.Node.Name
}

// issuerOf returns the issuer that a token claims, before it is verified.
func issuerOf(token string) (string, error) {
	b, err := payloadOf(token)
	if err != nil {
		return "", err
	}
	var claims struct {
		Issuer string `json:"iss"`
	}
	if json.Unmarshal(b, &claims) != nil {
		return "", errNoToken
	}
	return claims.Issuer, nil
}

var errNoToken = errors.New("the bearer token is not a JSON web token")

// payloadOf returns the claims in a token, which is not verified.
func payloadOf(token string) ([]byte, error) {
	if len(token) > MaxToken {
		return nil, fmt.Errorf("the token is larger than %d bytes", MaxToken)
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil, errNoToken
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || !json.Valid(b) {
		return nil, errNoToken
	}
	if err := checkClaims(b); err != nil {
		return nil, fmt.Errorf("the bearer token can't be used: %w", err)
	}
	return b, nil
}

// Inspect returns the principal of a token, as [Authenticator.Identify] does, by the issuers
// of a configuration. It does not verify the token: neither its signature, nor its time, nor
// its audience.
func Inspect(token string, issuers map[string]Issuer) (who policy.Principal, issuer Issuer, err error) {
	b, err := payloadOf(token)
	if err != nil {
		return who, issuer, err
	}
	var registered struct {
		Issuer  string `json:"iss"`
		Subject string `json:"sub"`
	}
	if json.Unmarshal(b, &registered) != nil {
		return who, issuer, errNoToken
	}
	if registered.Subject == "" {
		return who, issuer, errors.New("the token has no subject")
	}
	for name, i := range issuers {
		if i.URL == registered.Issuer {
			who, err = principal(name, registered.Subject, b)
			return who, i, err
		}
	}
	return who, issuer, fmt.Errorf("the token is from issuer %.200q, which is not among the issuers in the configuration", registered.Issuer)
}

// get returns the verifier of the issuer's tokens. Concurrent calls share one request to
// the issuer, and each stops waiting when its own ctx is done.
func (i *issuer) get(ctx context.Context) (*oidc.IDTokenVerifier, error) {
	i.mu.Lock()
	verifier, failure, failed := i.verifier, i.failure, i.failed
	i.mu.Unlock()
	if verifier != nil {
		return verifier, nil
	}
	if failure != nil && time.Since(failed) < failureTTL {
		return nil, failure
	}
	// The verifier keeps this context to fetch keys later, so it must outlive the request.
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

// signingAlgorithms are the asymmetric ones: an issuer publishes its keys.
var signingAlgorithms = []string{oidc.RS256, oidc.RS384, oidc.RS512, oidc.ES256, oidc.ES384, oidc.ES512, oidc.PS256, oidc.PS384, oidc.PS512, oidc.EdDSA}

func (i *issuer) discover(ctx context.Context) (*oidc.IDTokenVerifier, error) {
	conf := &oidc.Config{ClientID: i.conf.Audience}
	if i.conf.KeysURL != "" {
		conf.SupportedSigningAlgs = signingAlgorithms
		return oidc.NewVerifier(i.conf.URL, reportingKeys{newFreshKeys(ctx, i.conf.KeysURL)}, conf), nil
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
	return oidc.NewVerifier(i.conf.URL, reportingKeys{newFreshKeys(ctx, metadata.KeysURL)}, conf), nil
}

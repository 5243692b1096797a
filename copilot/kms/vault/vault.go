//go:build !no_vault

// Package vault has the keys of HashiCorp Vault and OpenBao: of their key-value engine,
// which gives keys out, and of their transit engine, which wraps with them. The build tag
// no_vault leaves it out.
package vault

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"time"
	"unicode"

	"github.com/hashicorp/vault/api"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/loopback"
)

// Types returns the types of backends that this package has.
func Types() kms.Types {
	return kms.Types{"vault-kv": openKV, "vault-transit": openTransit}
}

// maxAnswer bounds an answer of Vault, in bytes: it stores no more in one
// secret by default.
const maxAnswer = 1 << 20

// loginPause is how old a token must be for a new login to be worth a try when
// Vault does not say whether it refuses the token or what it may do.
const loginPause = 5 * time.Second

// settings are what the backends of HashiCorp Vault have in common.
// OpenBao has the same API.
type settings struct {
	// Address is https://HOST:PORT, http://HOST:PORT on this machine, or
	// unix:///PATH.
	Address string `toml:"address"`
	// Namespace of the secrets engine and of the login; empty for the root.
	Namespace string `toml:"namespace"`
	// CA is a PEM file of those to trust instead of the system's.
	CA string `toml:"ca"`
	// Mount is where the secrets engine is: "secret" or "transit" by default.
	Mount string `toml:"mount"`

	logins
}

// engine is a secrets engine of a Vault server.
type engine struct {
	client    *api.Client
	transport *http.Transport
	address   string
	mount     string

	// tokenFile is read for each request: others may replace the token in it.
	// If it is empty, login makes the body of a request to loginPath.
	tokenFile string
	loginPath string
	login     func() ([]byte, error)
	busy      chan struct{} // holds one while token is looked at or changed
	token     accessToken

	stop    context.CancelFunc
	stopped chan struct{}
}

func openEngine(s settings, mount string) (*engine, error) {
	v := &engine{address: s.Address, mount: strings.TrimSuffix(cmp.Or(s.Mount, mount), "/"), busy: make(chan struct{}, 1)}
	if err := checkPath(v.mount); err != nil {
		return nil, fmt.Errorf("mount = %.100q: %w", s.Mount, err)
	}
	base, err := v.connect(s)
	if err != nil {
		return nil, err
	}
	if v.client, err = api.NewClient(&api.Config{
		Address:          base,
		DisableRedirects: true, // the HTTP client does them
		HttpClient: &http.Client{
			Transport: boundedAnswers{v.transport},
			// A standby sends clients to the active server.
			CheckRedirect: func(req *http.Request, via []*http.Request) error {
				plain := req.URL.Scheme != "https" && (via[0].URL.Scheme == "https" || !loopback.Is(req.URL.Hostname()))
				if plain || len(via) > 1 {
					return fmt.Errorf("it redirects to %s://%s", req.URL.Scheme, req.URL.Host)
				}
				return nil
			},
		},
	}); err != nil {
		return nil, fmt.Errorf("address = %q: %w", s.Address, err)
	}
	// Nothing of all that comes from the environment.
	v.client.ClearToken()
	v.client.SetHeaders(http.Header{api.RequestHeaderName: {"true"}})
	v.client.SetWrappingLookupFunc(func(string, string) string { return "" })
	if s.Namespace != "" {
		v.client.SetNamespace(s.Namespace)
	}
	if s.TokenFile != "" {
		v.keepToken()
	}
	return v, nil
}

// connect makes v's transport and login, and returns the address to send
// requests to.
func (v *engine) connect(s settings) (string, error) {
	v.transport = &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		MaxIdleConns:           16,
		MaxIdleConnsPerHost:    16,
		IdleConnTimeout:        time.Minute,
		ForceAttemptHTTP2:      true,
		MaxResponseHeaderBytes: 16 << 10,
		TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12},
	}
	if s.CA != "" {
		var err error
		if v.transport.TLSClientConfig.RootCAs, err = certfile.Pool(s.CA); err != nil {
			return "", fmt.Errorf("ca: %w", err)
		}
	}
	if err := v.setLogin(s.logins); err != nil {
		return "", err
	}
	u, err := url.Parse(s.Address)
	if err != nil || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return "", errors.New("address is to be https://HOST:PORT, http://HOST:PORT on this machine, or unix:///PATH")
	}
	if u.Scheme != "https" && (s.CA != "" || s.Cert != nil) {
		return "", fmt.Errorf("address = %q: certificates are for https", s.Address)
	}
	switch {
	case u.Scheme == "unix" && u.Host == "" && filepath.IsAbs(u.Path):
		v.transport.Proxy = nil
		v.transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", u.Path)
		}
		return "http://vault", nil
	case u.Scheme == "http" && loopback.Is(u.Hostname()), u.Scheme == "https" && u.Hostname() != "":
		return s.Address, nil
	case u.Scheme == "http":
		return "", fmt.Errorf("address = %q: keys would cross the network unencrypted: use https", s.Address)
	}
	return "", fmt.Errorf("address = %q is neither https://HOST:PORT nor http://HOST:PORT on this machine nor unix:///PATH", s.Address)
}

// checkPath refuses a path that a server may take for another one, or for
// a list of several.
func checkPath(path string) error {
	if len(path) > 512 {
		return errors.New("a path has 512 bytes at most")
	}
	for segment := range strings.SplitSeq(path, "/") {
		if segment == "" || segment == "." || segment == ".." {
			return errors.New("a path has no segment that is empty, . or .. itself")
		}
	}
	if strings.ContainsFunc(path, func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }) {
		return errors.New("a path has only characters that can be printed")
	}
	return nil
}

// Close forgets the token. It is not revoked: it ends by itself.
func (v *engine) Close() error {
	if v.stop != nil {
		v.stop()
		<-v.stopped
	}
	v.transport.CloseIdleConnections()
	return nil
}

// boundedAnswers cuts off what is too long to be an answer of a Vault.
type boundedAnswers struct{ *http.Transport }

func (b boundedAnswers) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := b.Transport.RoundTrip(req)
	if err == nil {
		resp.Body = http.MaxBytesReader(nil, resp.Body, maxAnswer)
	}
	return resp, err
}

// request is a request of Vault's API.
type request struct {
	path  string // below /v1/, not escaped
	query url.Values
	body  []byte // of a write; nil for a read
}

// capability is what the policy has to grant for the request.
func (r request) capability() string {
	if r.body == nil {
		return "read"
	}
	return "update"
}

// refusal is an answer whose status is no success. Who asked may know
// better what it means, and changes kind and hint.
type refusal struct {
	what   string // was asked, and of whom
	status int
	said   string // by Vault; may be empty
	kind   error  // of the errors of this package
	hint   string // what to do; may be empty
	token  bool   // the token was refused, whatever was asked
}

func (e *refusal) Error() string {
	s := e.what + ": " + e.kind.Error()
	if e.said != "" {
		s += ": " + e.said
	}
	if e.hint != "" {
		s += ": " + e.hint
	}
	return s
}

func (e *refusal) Unwrap() error { return e.kind }

// refused returns the refusal in err if it has that status and says one of
// those words.
func refused(err error, status int, words ...string) (*refusal, bool) {
	var r *refusal
	if !errors.As(err, &r) || r.status != status {
		return nil, false
	}
	for _, w := range words {
		if strings.Contains(r.said, w) {
			return r, true
		}
	}
	return r, len(words) == 0
}

// do sends a request and decodes the answer into out, if that is not nil. It
// logs in before if it has to. Errors do not quote the answer, except what
// Vault says in it of a refusal.
func (v *engine) do(ctx context.Context, r request, out any) error {
	token, err := v.currentToken(ctx, "")
	if err != nil {
		return err
	}
	err = v.send(ctx, token.value, r, out)
	refusal, forbidden := refused(err, http.StatusForbidden)
	if !forbidden {
		return err
	}
	ended, alive := v.tokenState(ctx, token.value, refusal)
	if alive || !ended && time.Since(token.since) < loginPause {
		return err
	}
	fresh, loginErr := v.currentToken(ctx, token.value)
	if loginErr != nil {
		return loginErr
	}
	if fresh.value != token.value {
		return v.send(ctx, fresh.value, r, out)
	}
	if ended {
		refusal.token = true
		refusal.hint = fmt.Sprintf("the token in %s has expired, was revoked, or is not of this server: put a new one there", v.tokenFile)
	}
	return err
}

// tokenState reports whether a token that was refused has ended, and whether it
// is known to be alive, so that the refusal is about a policy. If it is neither,
// the server does not say.
func (v *engine) tokenState(ctx context.Context, token string, refusal *refusal) (ended, alive bool) {
	err := v.send(ctx, token, request{path: "auth/token/lookup-self"}, nil)
	if err == nil {
		return false, true
	}
	if _, forbidden := refused(err, http.StatusForbidden); !forbidden {
		return false, false
	}
	// A token without the policy "default" may not look itself up. Then the text
	// decides. Of a token that has ended, Vault 1.14 and OpenBao say "permission
	// denied" and no more, newer Vaults "2 errors occurred: * permission denied *
	// invalid token"; of a policy, both "1 error occurred: * permission denied".
	_, invalid := refused(refusal, http.StatusForbidden, "invalid token", "bad token")
	return invalid || refusal.said == "permission denied", false
}

// send is do with a token, or none if it is empty.
func (v *engine) send(ctx context.Context, token string, r request, out any) error {
	client := v.client.WithRequestCallbacks(func(req *api.Request) { req.ClientToken = token }).Logical()
	var resp *api.Response
	var err error
	if r.body == nil {
		resp, err = client.ReadRawWithDataWithContext(ctx, r.path, r.query)
	} else {
		resp, err = client.WriteRawWithContext(ctx, r.path, r.body)
	}
	if resp != nil {
		defer resp.Body.Close()
	}
	var body []byte
	var refusal *api.ResponseError
	if err == nil {
		body, err = io.ReadAll(resp.Body)
		defer clear(body)
	} else if errors.As(err, &refusal) && refusal.StatusCode == http.StatusNotFound && out != nil {
		// It may say what there was.
		body, _ = io.ReadAll(resp.Body)
		json.Unmarshal(body, out)
	}
	what := fmt.Sprintf("the Vault at %s: %s %s", v.address, r.capability(), r.path)
	var long *http.MaxBytesError
	switch {
	case errors.As(err, &long):
		err = fmt.Errorf("%w: its answer has more than %d bytes", kms.ErrUnavailable, maxAnswer)
	case refusal != nil:
		return newRefusal(what, r, refusal)
	case err != nil:
		err = fmt.Errorf("%w: %w", kms.ErrUnavailable, err)
	case resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusNoContent:
		err = fmt.Errorf("%w: it answers with status %d", kms.ErrUnavailable, resp.StatusCode)
	case out != nil && resp.StatusCode == http.StatusOK && json.Unmarshal(body, out) != nil: // whose error may quote the body
		err = fmt.Errorf("%w: it answers no JSON of Vault's API: is address right?", kms.ErrUnavailable)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

func newRefusal(what string, r request, e *api.ResponseError) *refusal {
	refusal := &refusal{what: what, status: e.StatusCode, kind: kms.ErrUnavailable}
	if !e.RawError {
		refusal.said = strings.ToValidUTF8(strings.Join(strings.Fields(strings.Join(e.Errors, "; ")), " "), "")
		refusal.said = refusal.said[:min(len(refusal.said), 300)]
	}
	switch e.StatusCode {
	case http.StatusForbidden:
		refusal.kind = kms.ErrForbidden
		refusal.hint = fmt.Sprintf("the policy of the broker's token needs path %q { capabilities = [%q] }", r.path, r.capability())
	case http.StatusNotFound:
		refusal.kind = kms.ErrNotFound
	case http.StatusServiceUnavailable:
		if strings.Contains(refusal.said, "sealed") {
			refusal.hint = "unseal it (vault operator unseal)"
		}
	case http.StatusTooManyRequests:
		refusal.hint = "raise its rate limit quota"
	}
	if refusal.said == "" && refusal.kind == kms.ErrUnavailable {
		refusal.said = fmt.Sprintf("status %d", e.StatusCode)
	}
	return refusal
}

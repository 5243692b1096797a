package client

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

// ErrNoIDToken: the GitHub Actions job can't get a token of its own.
var ErrNoIDToken = errors.New("GitHub gives this job no ID token")

// idTokenPermission says what a job needs to get a token.
const idTokenPermission = `give the job "permissions: id-token: write", which jobs for pull requests from forks can't have`

// The variables that a job with that permission has: see
// https://docs.github.com/en/actions/reference/security/oidc.
const (
	gitHubURL    = "ACTIONS_ID_TOKEN_REQUEST_URL"
	gitHubBearer = "ACTIONS_ID_TOKEN_REQUEST_TOKEN"
)

// gitHubTimeout bounds one try.
const gitHubTimeout = 5 * time.Second

// gitHubToken is the token of a GitHub Actions job. It is fetched when it is needed, and
// again once half of its time is over.
type gitHubToken struct {
	url    string
	bearer string // to show GitHub
	http   *http.Client

	turn  chan struct{} // has one element, which the one who uses what follows has taken
	value string
	until time.Time // when another is to be fetched
}

// newGitHubToken returns the token of the job that this process is part of, for an
// audience. Errors wrap [ErrNoIDToken].
func newGitHubToken(audience string) (*gitHubToken, error) {
	for _, name := range []string{gitHubURL, gitHubBearer} {
		if os.Getenv(name) == "" {
			return nil, fmt.Errorf("%w: %s is not set: %s; into a container of your own, pass %s and %s on", ErrNoIDToken, name, idTokenPermission, gitHubURL, gitHubBearer)
		}
	}
	u, err := url.Parse(os.Getenv(gitHubURL))
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("%w: %s is not an https URL", ErrNoIDToken, gitHubURL)
	}
	query := u.Query()
	query.Set("audience", audience)
	u.RawQuery = query.Encode()
	t := &gitHubToken{url: u.String(), bearer: os.Getenv(gitHubBearer), turn: make(chan struct{}, 1), http: &http.Client{
		Transport:     &http.Transport{Proxy: http.ProxyFromEnvironment, ForceAttemptHTTP2: true, MaxResponseHeaderBytes: 16 << 10, IdleConnTimeout: 15 * time.Second},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	t.turn <- struct{}{}
	return t, nil
}

func (t *gitHubToken) authorization(ctx context.Context) (string, error) {
	select {
	case <-t.turn:
		defer func() { t.turn <- struct{}{} }()
	case <-ctx.Done():
		return "", fmt.Errorf("GitHub's ID token: %w", ctx.Err())
	}
	if time.Now().Before(t.until) {
		return "Bearer " + t.value, nil
	}
	tries := backOff{most: maxTries}
	for {
		asked := time.Now()
		value, again, err := t.fetch(ctx)
		if err == nil {
			// By this machine's monotonic clock, whatever time it has.
			t.value, t.until = value, asked.Add(lifetime(value)/2)
			return "Bearer " + value, nil
		}
		if !again.possible || !tries.wait(ctx, again.after) {
			return "", err
		}
	}
}

// fetch gets a token from GitHub. Errors quote neither token.
func (t *gitHubToken) fetch(ctx context.Context) (token string, again retry, err error) {
	ctx, cancel := context.WithTimeout(ctx, gitHubTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.url, nil)
	if err != nil {
		return "", retry{}, fmt.Errorf("%w: %s can't be used", ErrNoIDToken, gitHubURL)
	}
	req.Header.Set("Authorization", "bearer "+t.bearer)
	req.Header.Set("Accept", "application/json")
	resp, err := t.http.Do(req)
	if err != nil {
		return "", retry{possible: true}, fmt.Errorf("get an ID token from GitHub at %s: %w", req.URL.Host, withoutURL(err))
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 2*maxToken))
	switch {
	case err != nil:
		return "", retry{possible: true}, fmt.Errorf("get an ID token from GitHub at %s: its answer breaks off: %w", req.URL.Host, err)
	case resp.StatusCode == http.StatusUnauthorized, resp.StatusCode == http.StatusForbidden:
		return "", retry{}, fmt.Errorf("%w: %s answered %s: %s", ErrNoIDToken, req.URL.Host, resp.Status, idTokenPermission)
	case resp.StatusCode != http.StatusOK:
		again = retryOf(resp)
		again.possible = again.possible || resp.StatusCode >= http.StatusInternalServerError
		return "", again, fmt.Errorf("%w: %s answered %s", ErrNoIDToken, req.URL.Host, resp.Status)
	}
	var answer struct {
		Value string `json:"value"`
	}
	if json.Unmarshal(body, &answer) != nil {
		return "", retry{}, fmt.Errorf("%w: %s did not answer in JSON", ErrNoIDToken, req.URL.Host)
	}
	if token, err = checkToken(answer.Value); err != nil {
		return "", retry{}, fmt.Errorf("%w: the value that %s answered %w", ErrNoIDToken, req.URL.Host, err)
	}
	return token, retry{}, nil
}

// lifetime returns how long a token is valid from its issue, or 0 if it does not say.
func lifetime(token string) time.Duration {
	var claims struct {
		Issued  float64 `json:"iat"`
		Expires float64 `json:"exp"`
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return 0
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || json.Unmarshal(b, &claims) != nil || claims.Issued == 0 {
		return 0
	}
	return time.Duration(max(0, min(claims.Expires-claims.Issued, 24*3600)) * float64(time.Second))
}

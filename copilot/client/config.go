package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/loopback"
)

// Config says where the brokers are and how to reach them.
type Config struct {
	// URLs are those of brokers that have the same KEKs. Each is
	// unix:///PATH, http://HOST:PORT on this machine, or https://HOST:PORT.
	// One whose path ends in /api/v1/key has the original's API, any other
	// copilot's own; all have the same.
	URLs []string
	// CAFile holds the CA certificates that the brokers' must come from, in
	// PEM. Default: the system's.
	CAFile string
	// CertFile and KeyFile hold the certificate and the private key to show
	// the brokers, in PEM. They are read for each new connection, so they
	// can be replaced while the client runs.
	CertFile, KeyFile string
	// TokenFile holds a bearer token to show the brokers, over TLS or a unix
	// socket. It is read for each call that finds it changed.
	TokenFile string
	// TokenVariable names an environment variable with such a token, as a GitLab job has
	// by id_tokens. It is read once.
	TokenVariable string
	// GitHubAudience has the client get such tokens as the GitHub Actions job that it is
	// part of, for this audience: that of the issuer in copilot's configuration.
	GitHubAudience string
	// Timeout bounds a call with all its tries at all brokers. Default: 10
	// seconds.
	Timeout time.Duration
}

// connectTimeout bounds the attempt to connect to one of several brokers.
const connectTimeout = 1500 * time.Millisecond

// pingTimeout is how long a connection over which nothing comes is kept before the
// broker has to answer a ping, and how long the ping may take. Idle ones are closed
// before there are many pings. After an outage of the network, TCP recovers only after
// minutes, or never.
const pingTimeout = 2 * time.Second

func (c Config) brokers() ([]*endpoint, error) {
	if len(c.URLs) == 0 {
		return nil, errors.New("no broker is configured")
	}
	if (c.CAFile != "" || c.CertFile != "") && c.first("https") == "" {
		return nil, fmt.Errorf("%s: certificates are for https: use https://HOST:PORT, or leave the CA and the client certificate out", strings.Join(c.URLs, ", "))
	}
	if plain := c.first("http"); plain != "" && c.TokenFile+c.TokenVariable+c.GitHubAudience != "" {
		return nil, fmt.Errorf("%s: the token would be sent unencrypted: use https or a unix socket", plain)
	}
	tls, cert, err := c.tls()
	if err != nil {
		return nil, err
	}
	var list []*endpoint
	for i, u := range c.URLs {
		if slices.Contains(c.URLs[:i], u) {
			return nil, fmt.Errorf("%s is named twice", u)
		}
		t := &http.Transport{
			DialContext:            new(net.Dialer).DialContext,
			TLSClientConfig:        tls.Clone(),
			MaxIdleConns:           16,
			MaxIdleConnsPerHost:    16,
			IdleConnTimeout:        15 * time.Second,
			ForceAttemptHTTP2:      true,
			DisableCompression:     true, // or a copy of a key stays in the decompressor
			MaxResponseHeaderBytes: 16 << 10,
			HTTP2:                  &http.HTTP2Config{SendPingTimeout: pingTimeout, PingTimeout: pingTimeout},
		}
		if len(c.URLs) > 1 {
			t.DialContext = (&net.Dialer{Timeout: connectTimeout}).DialContext
			t.TLSHandshakeTimeout = connectTimeout
		}
		base, err := parseURL(u, t)
		if err != nil {
			return nil, err
		}
		list = append(list, &endpoint{
			url:  u,
			base: base,
			http: &http.Client{
				Transport:     t,
				CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
			},
			cert:     cert,
			original: strings.HasSuffix(base.Path, originalPath),
			health:   health{rtt: notMeasured, probeAt: time.Now().Add(measureFirst)},
		})
	}
	return list, nil
}

// first returns the first URL of a scheme, or nothing.
func (c Config) first(scheme string) string {
	for _, u := range c.URLs {
		if s, _, _ := strings.Cut(u, ":"); strings.EqualFold(s, scheme) {
			return u
		}
	}
	return ""
}

// parseURL returns the URL that a broker's requests start from, and sets how t
// connects if it is a socket.
func parseURL(s string, t *http.Transport) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil {
		return nil, fmt.Errorf("%q is not a URL", s)
	}
	if u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("%s: a broker's URL has no user, query or fragment", u.Redacted())
	}
	switch u.Scheme {
	case "unix":
		path := u.Path
		if u.Host != "" || !filepath.IsAbs(path) {
			return nil, fmt.Errorf("%s: a unix socket has an absolute path, as in unix:///run/copilot/copilot.sock", s)
		}
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}
		return &url.URL{Scheme: "http", Host: "copilot"}, nil
	case "http":
		if !loopback.Is(u.Hostname()) {
			return nil, fmt.Errorf("%s: KEKs would cross the network unencrypted: use https", s)
		}
	case "https":
	default:
		return nil, fmt.Errorf("%q is neither unix:///PATH nor https://HOST:PORT nor http:// on this machine", s)
	}
	if u.Host == "" {
		return nil, fmt.Errorf("%s has no host", s)
	}
	u.Path = strings.TrimRight(u.Path, "/")
	u.RawPath = ""
	return u, nil
}

// tls returns how to connect by TLS, and the certificate to show, which may be
// nil.
func (c Config) tls() (*tls.Config, *certfile.Pair, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CAFile != "" {
		var err error
		if conf.RootCAs, err = certfile.Pool(c.CAFile); err != nil {
			return nil, nil, fmt.Errorf("CA: %w", err)
		}
	}
	if (c.CertFile == "") != (c.KeyFile == "") {
		return nil, nil, errors.New("a client certificate and its private key must be set together")
	}
	if c.CertFile == "" {
		return conf, nil, nil
	}
	pair, err := certfile.Load(c.CertFile, c.KeyFile)
	if err != nil {
		return nil, nil, fmt.Errorf("client certificate: %w", err)
	}
	conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return pair.Certificate(), nil }
	return conf, pair, nil
}

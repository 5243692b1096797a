package copilot

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"time"

	"github.com/ctrlplane/pilot/certfile"
)

// Config says where the broker is and how to reach it.
type Config struct {
	// URL is unix:///PATH, http://HOST:PORT on this machine, or
	// https://HOST:PORT. One whose path ends in /api/v1/key speaks the
	// original's API, any other copilot's own.
	URL string
	// CAFile holds the CA certificates that the broker's must come from, in
	// PEM. Default: the system's.
	CAFile string
	// CertFile and KeyFile hold the certificate and the private key to show
	// the broker, in PEM. They are read for each new connection, so they
	// can be replaced while the client runs.
	CertFile, KeyFile string
	// Timeout bounds a call with all its tries. Default: 10 seconds.
	Timeout time.Duration
}

// transport returns the URL that requests start from, and how they travel.
func (c Config) transport() (*url.URL, *http.Transport, error) {
	u, err := url.Parse(c.URL)
	if err != nil {
		return nil, nil, fmt.Errorf("%q is not a URL", c.URL)
	}
	if u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, nil, fmt.Errorf("%s has a user, a query or a fragment, and can't", u.Redacted())
	}
	t := &http.Transport{
		MaxIdleConns:           16,
		MaxIdleConnsPerHost:    16,
		IdleConnTimeout:        time.Minute,
		ForceAttemptHTTP2:      true,
		MaxResponseHeaderBytes: 16 << 10,
	}
	hasTLS := c.CAFile != "" || c.CertFile != ""
	switch u.Scheme {
	case "unix":
		path := u.Path
		if u.Host != "" || !filepath.IsAbs(path) {
			return nil, nil, fmt.Errorf("%s: a unix socket has an absolute path, as in unix:///run/copilot/copilot.sock", c.URL)
		}
		if hasTLS {
			return nil, nil, fmt.Errorf("%s: certificates are for https, not for a unix socket", c.URL)
		}
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}
		return &url.URL{Scheme: "http", Host: "copilot"}, t, nil
	case "http":
		if !loopback(u.Hostname()) {
			return nil, nil, fmt.Errorf("%s: KEKs would cross the network in plain: use https", c.URL)
		}
		if hasTLS {
			return nil, nil, fmt.Errorf("%s: certificates are for https", c.URL)
		}
	case "https":
		if t.TLSClientConfig, err = c.tls(); err != nil {
			return nil, nil, err
		}
	default:
		return nil, nil, fmt.Errorf("%q is neither unix:///PATH nor https://HOST:PORT nor http:// on this machine", c.URL)
	}
	if u.Host == "" {
		return nil, nil, fmt.Errorf("%s names no host", c.URL)
	}
	u.Path = trimSlash(u.Path)
	u.RawPath = ""
	return u, t, nil
}

func (c Config) tls() (*tls.Config, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CAFile != "" {
		var err error
		if conf.RootCAs, err = certfile.Pool(c.CAFile); err != nil {
			return nil, fmt.Errorf("CA: %w", err)
		}
	}
	if (c.CertFile == "") != (c.KeyFile == "") {
		return nil, errors.New("a client certificate and its private key go together")
	}
	if c.CertFile != "" {
		pair, err := certfile.Load(c.CertFile, c.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("client certificate: %w", err)
		}
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return pair.Certificate(), nil }
	}
	return conf, nil
}

// loopback reports whether host is this machine.
func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func trimSlash(path string) string {
	for len(path) > 0 && path[len(path)-1] == '/' {
		path = path[:len(path)-1]
	}
	return path
}

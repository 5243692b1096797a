package mirror

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"golang.org/x/net/http/httpproxy"
)

// errOutOfReach is the error of an address that the mirror does not ask for its callers.
var errOutOfReach = errors.New("the mirror does not ask addresses that only this machine reaches")

// zone is from where an address can be reached.
type zone int

const (
	elsewhere  zone = iota
	onLoopback      // by this machine alone
	onLink          // link-local addresses, and those of clouds' metadata
)

// metadata are the addresses of clouds' metadata that are not link-local: of EC2 and Google
// Cloud over IPv6, Alibaba Cloud and Oracle Cloud.
var metadata = []netip.Addr{
	netip.MustParseAddr("fd00:ec2::254"), netip.MustParseAddr("fd20:ce::254"), netip.MustParseAddr("100.100.100.200"), netip.MustParseAddr("192.0.0.192"),
}

func zoneOf(a netip.Addr) zone {
	switch a = a.Unmap(); {
	case a.IsLoopback() || a.IsUnspecified():
		return onLoopback
	case a.IsLinkLocalUnicast() || a.IsMulticast() || slices.Contains(metadata, a):
		return onLink
	}
	return elsewhere
}

// reach bounds what is asked on behalf of callers. They name registries, and registries
// name other hosts, in redirects and for tokens. Only where the administrator has named the
// registry may it be on this machine or its link, and only a registry that is there may lead
// there.
type reach struct {
	// own are the addresses of the registry's hosts, as HOST:PORT. Those that are true the
	// administrator has named.
	own map[string]bool
	// proxies are the addresses of the HTTP proxies in the environment.
	proxies []string
	// loopback says that callers may name registries on loopback addresses.
	loopback bool

	mu sync.Mutex
	at map[zone]bool // where the registry itself is
}

func newReach(loopback bool) *reach {
	r := &reach{own: map[string]bool{}, loopback: loopback, at: map[zone]bool{elsewhere: true}}
	proxy := httpproxy.FromEnvironment().ProxyFunc()
	for _, scheme := range []string{"http", "https"} {
		if u, err := proxy(&url.URL{Scheme: scheme, Host: "registry.invalid"}); err == nil && u != nil {
			r.proxies = append(r.proxies, addresses(u.Scheme, u.Host)...)
		}
	}
	return r
}

// addresses returns HOST:PORT of a host, whose port may be missing.
func addresses(scheme, host string) []string {
	u := url.URL{Host: host}
	switch {
	case u.Port() != "":
		return []string{host}
	case scheme == "https":
		// containerd's client may fall back to http.
		return []string{net.JoinHostPort(u.Hostname(), "443"), net.JoinHostPort(u.Hostname(), "80")}
	case scheme == "socks5" || scheme == "socks5h":
		return []string{net.JoinHostPort(u.Hostname(), "1080")}
	}
	return []string{net.JoinHostPort(u.Hostname(), "80")}
}

// add adds the hosts of a registry. Named says that the administrator has named it.
func (r *reach) add(registry string, named bool, hosts []docker.RegistryHost) {
	usual, err := docker.DefaultHost(registry)
	for _, h := range hosts {
		for _, a := range addresses(h.Scheme, h.Host) {
			r.own[a] = r.own[a] || named || err != nil || h.Host != usual && h.Host != registry
		}
	}
}

// dialer returns a dialer that connects as dial does, and keeps to what may be reached.
func (r *reach) dialer(dial func(ctx context.Context, network, address string) (net.Conn, error)) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		if slices.Contains(r.proxies, address) {
			return conn, err
		}
		if refusal := r.check(address, zoneOfConn(conn, err)); refusal != nil {
			if conn != nil {
				conn.Close()
			}
			// The same whether something listens there or not.
			return nil, refusal
		}
		return conn, err
	}
}

// zoneOfConn returns where a connection leads to, or where it could not be made to.
func zoneOfConn(conn net.Conn, err error) zone {
	var remote net.Addr
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		remote = op.Addr
	}
	if conn != nil {
		remote = conn.RemoteAddr()
	}
	tcp, ok := remote.(*net.TCPAddr)
	if !ok {
		return elsewhere
	}
	return zoneOf(tcp.AddrPort().Addr())
}

// check returns an error if an address, as HOST:PORT, must not be asked where it is.
func (r *reach) check(address string, where zone) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	named, own := r.own[address]
	if own && (named || where == elsewhere || where == onLoopback && r.loopback) {
		r.at[where] = true
		return nil
	}
	if !own && r.at[where] {
		return nil
	}
	if own {
		return fmt.Errorf("%s: %w: name it in mirror-allowed-upstreams, mirror-upstream or mirror-hosts-dir", address, errOutOfReach)
	}
	return fmt.Errorf("the registry leads to %s: %w", address, errOutOfReach)
}

// checkURL returns an error if an address in a URL must not be asked. A proxy may be who
// connects to it.
func (r *reach) checkURL(u *url.URL) error {
	a, err := netip.ParseAddr(u.Hostname())
	if err != nil {
		return nil // a name: what it stands for is seen when it is dialed
	}
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return r.check(net.JoinHostPort(u.Hostname(), port), zoneOf(a))
}

const (
	// maxToken bounds the answer to a request for a token, in bytes. containerd's client
	// reads all of it, as it does with a manifest whose digest it has to compute.
	maxToken = 1 << 20
	// maxHeader bounds the header of an answer, in bytes.
	maxHeader = 256 << 10
)

// guarded asks only what may be reached.
type guarded struct {
	http.RoundTripper
	reach *reach
	via   string // marks requests for what the registry has
}

func (g guarded) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := g.reach.checkURL(req.URL); err != nil {
		if req.Body != nil {
			req.Body.Close()
		}
		return nil, err
	}
	resp, err := g.RoundTripper.RoundTrip(req)
	first := req
	for first.Response != nil { // which redirected
		first = first.Response.Request
	}
	if err != nil {
		return nil, err
	}
	switch {
	case !slices.Contains(first.Header.Values("Via"), g.via):
		limit(resp, maxToken)
	case strings.Contains(first.URL.Path, "/manifests/"):
		limit(resp, docker.MaxManifestSize+1)
	}
	return resp, nil
}

// limit bounds the body of a response, in bytes.
func limit(resp *http.Response, most int64) {
	resp.Body = struct {
		io.Reader
		io.Closer
	}{io.LimitReader(resp.Body, most), resp.Body}
}

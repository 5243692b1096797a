package mirror

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/log"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/image/registry"
	"github.com/ctrlplane/pilot/internal/loopback"
)

const (
	// maxIdleConnections is how many connections to a registry are kept for the next
	// requests: a container that reads makes many at once.
	maxIdleConnections = 16
	// maxUpstreams bounds the registries that are remembered with their tokens and
	// connections, each once for each caller's credentials.
	maxUpstreams = 128
	// upstreamTTL is how long they are, so that changes of the hosts directory count.
	upstreamTTL = 5 * time.Minute
)

// upstreams are the registries that the mirror asks.
type upstreams struct {
	conf Config
	via  string // marks the mirror's own requests

	mu    sync.Mutex
	known map[upstreamKey]*upstream
}

// upstreamKey is a registry and the credentials that it is asked with.
type upstreamKey struct {
	registry    string
	credentials [sha256.Size]byte // of the caller, or zero
	trusted     bool              // the caller is
}

// upstream is a registry that is asked with certain credentials.
type upstream struct {
	upstreamKey
	hosts     []docker.RegistryHost
	throttle  throttle
	reach     *reach
	succeeded atomic.Bool   // it has answered a request with these credentials
	searching chan struct{} // has one while a digest is searched for

	manifestTimeout time.Duration

	made time.Time
	used time.Time
}

// worth returns how much an upstream is worth to be remembered: one that has never answered
// least, as with a password that somebody makes up, and one with the mirror's own
// credentials most.
func (u *upstream) worth() int {
	switch {
	case !u.succeeded.Load():
		return 0
	case u.credentials != [sha256.Size]byte{}:
		return 1
	}
	return 2
}

// enter waits for room in places. The caller must call leave.
func enter(ctx context.Context, places chan struct{}) (leave func(), err error) {
	select {
	case places <- struct{}{}:
		return func() { <-places }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (u *upstreams) init(conf Config) {
	u.conf, u.via, u.known = conf, "1.1 pilot-mirror-"+rand.Text(), map[upstreamKey]*upstream{}
}

// isOwn reports whether a request was made by this mirror.
func (u *upstreams) isOwn(h http.Header) bool {
	for _, via := range h.Values("Via") {
		if strings.Contains(via, u.via) {
			return true
		}
	}
	return false
}

// of returns a registry, to be asked with the caller's credentials or the mirror's own.
func (u *upstreams) of(c caller, name string) (*upstream, error) {
	key := upstreamKey{registry: name, trusted: c.trusted}
	if c.named {
		key.credentials = sha256.Sum256([]byte(c.user + "\x00" + c.secret))
	}
	now := time.Now()
	u.mu.Lock()
	defer u.mu.Unlock()
	if known := u.known[key]; known != nil && now.Sub(known.made) < upstreamTTL {
		known.used = now
		return known, nil
	}
	made, err := u.make(c, name)
	if err != nil {
		return nil, err
	}
	made.upstreamKey, made.made, made.used = key, now, now
	u.add(made)
	return made, nil
}

// add remembers an upstream, and forgets that which is worth least, if there are too many:
// of several the one that was not used for the longest time.
func (u *upstreams) add(made *upstream) {
	delete(u.known, made.upstreamKey)
	for len(u.known) >= maxUpstreams {
		var least *upstream
		for _, other := range u.known {
			if least == nil || cmp.Or(cmp.Compare(other.worth(), least.worth()), other.used.Compare(least.used)) < 0 {
				least = other
			}
		}
		delete(u.known, least.upstreamKey)
	}
	u.known[made.upstreamKey] = made
}

func (u *upstreams) make(c caller, name string) (*upstream, error) {
	configured := url.URL{Host: u.conf.Upstream}
	made := &upstream{reach: newReach(c.trusted || loopback.Is(configured.Hostname())), searching: make(chan struct{}, 1), manifestTimeout: u.conf.ManifestTimeout}
	// Nothing of this is bound to a request.
	ctx := log.WithLogger(context.Background(), quiet)
	options := config.HostOptions{
		UpdateClient: func(client *http.Client) error {
			if t, ok := client.Transport.(*http.Transport); ok {
				t.DialContext, t.MaxResponseHeaderBytes = made.reach.dialer(t.DialContext), maxHeader
				t.MaxIdleConns, t.MaxIdleConnsPerHost = maxIdleConnections, maxIdleConnections
			}
			client.Transport = guarded{throttled{client.Transport, made}, made.reach, u.via}
			return nil
		},
		Credentials: func(host string) (string, string, error) {
			switch {
			case c.named:
				return c.user, c.secret, nil
			case u.conf.Credentials != nil:
				return u.conf.Credentials(ctx, host)
			}
			return "", "", nil
		},
	}
	named := name == u.conf.Upstream || slices.Contains(u.conf.AllowedUpstreams, name)
	if u.conf.HostsDir != "" {
		find := config.HostDirFromRoot(u.conf.HostsDir)
		options.HostDir = func(host string) (string, error) {
			dir, err := find(host)
			named = named || err == nil && filepath.Base(dir) != "_default"
			return dir, err
		}
	}
	list, err := config.ConfigureHosts(ctx, options)(name)
	if err != nil {
		return nil, err
	}
	for i := range list {
		list[i].Header = list[i].Header.Clone()
		if list[i].Header == nil {
			list[i].Header = http.Header{}
		}
		list[i].Header.Add("Via", u.via)
	}
	made.hosts = list
	made.reach.add(name, named, list)
	return made, nil
}

// repository is a repository of a registry, as one caller may read it.
type repository struct {
	*registry.Repository
	target
	upstream *upstream
	read     atomic.Int64 // bytes of manifests and indexes
}

// open returns the repository that a request is about.
func (m *Mirror) open(ctx context.Context, c caller, t target) (*repository, error) {
	u, err := m.upstreams.of(c, t.registry)
	if err != nil {
		return nil, err
	}
	return u.open(ctx, t)
}

func (u *upstream) open(ctx context.Context, t target) (*repository, error) {
	name := t.registry + "/" + t.repository
	if t.kind == "manifests" {
		name = t.reference()
	}
	r, err := registry.Open(ctx, name, func(string) ([]docker.RegistryHost, error) { return u.hosts, nil })
	if err != nil {
		return nil, err
	}
	return &repository{Repository: r, target: t, upstream: u}, nil
}

// ReaderAt reads from the registry only, and not from URLs in a descriptor, and no more
// manifests and indexes than are remembered of all images, each as a whole and in time.
func (r *repository) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	desc.URLs = nil
	if !registry.IsDocument(desc.MediaType) {
		return r.Repository.ReaderAt(ctx, desc)
	}
	if r.read.Add(max(desc.Size, 0)) > maxImages {
		return nil, fmt.Errorf("%w: its manifests and indexes have more than %d bytes", image.ErrLimit, maxImages)
	}
	ctx, cancel := context.WithTimeout(ctx, r.upstream.manifestTimeout)
	defer cancel()
	return r.Repository.ReaderAt(ctx, desc)
}

const (
	// leastThrottle and longestThrottle bound for how long a registry that has answered
	// 429 is not asked, whatever it says.
	leastThrottle   = time.Second
	longestThrottle = 5 * time.Minute
)

// throttle remembers until when hosts want no requests.
type throttle struct {
	mu    sync.Mutex
	until map[string]time.Time // by host
}

// left returns for how long no host of the registry wants requests, or 0.
func (t *throttle) left() (most time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, until := range t.until {
		most = max(most, time.Until(until))
	}
	return most
}

func (t *throttle) leftAt(host string) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	return time.Until(t.until[host])
}

// note remembers an answer 429 of a host.
func (t *throttle) note(host, retryAfter string) {
	wait := leastThrottle
	if s, err := strconv.Atoi(retryAfter); err == nil {
		wait = time.Duration(min(s, int(longestThrottle/time.Second))) * time.Second
	} else if at, err := http.ParseTime(retryAfter); err == nil {
		wait = time.Until(at)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.until == nil {
		t.until = map[string]time.Time{}
	}
	t.until[host] = time.Now().Add(min(max(wait, leastThrottle), longestThrottle))
}

// throttled answers requests to a host that wants none itself: the client above it
// would repeat them at once.
type throttled struct {
	http.RoundTripper
	upstream *upstream
}

func (t throttled) RoundTrip(r *http.Request) (*http.Response, error) {
	throttle := &t.upstream.throttle
	if throttle.leftAt(r.URL.Host) > 0 {
		if r.Body != nil {
			r.Body.Close()
		}
		return &http.Response{
			Status: "429 Too Many Requests", StatusCode: http.StatusTooManyRequests,
			Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{}, Body: http.NoBody, Request: r,
		}, nil
	}
	resp, err := t.RoundTripper.RoundTrip(r)
	if err == nil && resp.StatusCode == http.StatusTooManyRequests {
		throttle.note(r.URL.Host, resp.Header.Get("Retry-After"))
	}
	if err == nil && resp.StatusCode < http.StatusBadRequest {
		t.upstream.succeeded.Store(true)
	}
	return resp, err
}

package mirror

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

func TestZones(t *testing.T) {
	for text, want := range map[string]zone{
		"127.0.0.1": onLoopback, "127.8.9.1": onLoopback, "::1": onLoopback, "::ffff:127.0.0.1": onLoopback, "0.0.0.0": onLoopback, "::": onLoopback,
		"169.254.169.254": onLink, "::ffff:169.254.169.254": onLink, "fe80::1": onLink, "fd00:ec2::254": onLink, "100.100.100.200": onLink,
		"10.0.0.1": elsewhere, "192.168.1.1": elsewhere, "203.0.113.7": elsewhere, "2001:db8::1": elsewhere, "fd00::1": elsewhere,
	} {
		if got := zoneOf(netip.MustParseAddr(text)); got != want {
			t.Errorf("%s: %d, want %d", text, got, want)
		}
	}
}

// TestReach has registries lead to addresses, once they have been asked where they are.
func TestReach(t *testing.T) {
	at := func(host string) []docker.RegistryHost { return []docker.RegistryHost{{Scheme: "https", Host: host}} }
	for name, c := range map[string]struct {
		registry        string
		named, loopback bool
		hosts           []docker.RegistryHost
		at              zone // of the registry
		own             bool // it may be asked
		onLoopback      bool // it may lead there
		onLink          bool
	}{
		"a registry":                    {registry: "r.test", hosts: at("r.test"), own: true},
		"Docker Hub":                    {registry: "docker.io", hosts: at("registry-1.docker.io"), own: true},
		"a name of loopback":            {registry: "r.test:5000", hosts: at("r.test:5000"), at: onLoopback},
		"beside one on loopback":        {registry: "localhost:5000", hosts: at("localhost:5000"), at: onLoopback, loopback: true, own: true, onLoopback: true},
		"named, on loopback":            {registry: "r.test", named: true, hosts: at("r.test"), at: onLoopback, own: true, onLoopback: true},
		"by its hosts.toml on loopback": {registry: "r.test", hosts: at("127.0.0.1:5000"), at: onLoopback, own: true, onLoopback: true},
		"metadata":                      {registry: "169.254.169.254", hosts: at("169.254.169.254"), at: onLink, loopback: true},
		"named, link-local":             {registry: "169.254.1.1:5000", named: true, hosts: at("169.254.1.1:5000"), at: onLink, own: true, onLink: true},
	} {
		r := newReach(c.loopback)
		r.add(c.registry, c.named, c.hosts)
		own := addresses("https", c.hosts[0].Host)[0]
		for _, step := range []struct {
			address string
			zone    zone
			want    bool
		}{{own, c.at, c.own}, {"other.test:443", elsewhere, true}, {"other.test:443", onLoopback, c.onLoopback}, {"other.test:80", onLink, c.onLink}} {
			err := r.check(step.address, step.zone)
			if (err == nil) != step.want || err != nil && !errors.Is(err, errOutOfReach) {
				t.Errorf("%s: %s in zone %d: %v", name, step.address, step.zone, err)
			}
		}
	}
}

// TestDialerSaysNothingOfWhatListens dials a port that is open and one that is not.
func TestDialerSaysNothingOfWhatListens(t *testing.T) {
	s := httptest.NewServer(http.NotFoundHandler())
	defer s.Close()
	closed := httptest.NewServer(http.NotFoundHandler())
	closed.Close()
	r := newReach(false)
	r.add("registry.test", false, []docker.RegistryHost{{Scheme: "https", Host: "registry.test"}})
	dial := r.dialer(new(net.Dialer).DialContext)
	var said []string
	for _, u := range []string{s.URL, closed.URL} {
		address := strings.TrimPrefix(u, "http://")
		conn, err := dial(context.Background(), "tcp", address)
		if conn != nil || !errors.Is(err, errOutOfReach) {
			t.Fatalf("%s: %v %v", address, conn, err)
		}
		said = append(said, strings.Replace(err.Error(), address, "", 1))
	}
	if said[0] != said[1] {
		t.Errorf("%q", said)
	}
	// A proxy does not connect for it either.
	u, err := url.Parse("http://169.254.169.254/latest/meta-data/")
	if err != nil {
		t.Fatal(err)
	}
	if err := r.checkURL(u); !errors.Is(err, errOutOfReach) {
		t.Error(err)
	}
}

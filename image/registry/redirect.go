package registry

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// maxRedirects is how many redirects of a request are followed.
const maxRedirects = 10

// Guarded returns hosts that keep their configured headers, which may be credentials, from
// the hosts that they redirect to. Go's client does so only for those that it knows.
func Guarded(hosts docker.RegistryHosts) docker.RegistryHosts {
	return func(name string) ([]docker.RegistryHost, error) {
		list, err := hosts(name)
		list = slices.Clone(list)
		for i, h := range list {
			client := http.Client{}
			if h.Client != nil {
				client = *h.Client
			}
			secret := slices.AppendSeq([]string{"Authorization", "Cookie"}, maps.Keys(h.Header))
			client.CheckRedirect = func(req *http.Request, via []*http.Request) error {
				return checkRedirect(req, via, secret)
			}
			list[i].Client = &client
		}
		return list, err
	}
}

func checkRedirect(req *http.Request, via []*http.Request, secret []string) error {
	if len(via) >= maxRedirects {
		return fmt.Errorf("stopped after %d redirects", maxRedirects)
	}
	first := via[0].URL
	plain := first.Scheme == "https" && req.URL.Scheme != "https"
	if plain && req.Method != http.MethodGet && req.Method != http.MethodHead {
		return errors.New("the registry redirects an upload to an address without https")
	}
	if plain || req.URL.Host != first.Host {
		for _, name := range secret {
			delete(req.Header, name)
		}
	}
	return nil
}

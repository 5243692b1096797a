package caller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
)

const (
	// nodeTTL is how long the addresses of a node are not fetched again, and nodeRetry if a
	// token comes from another address, or if that failed.
	nodeTTL   = 10 * time.Minute
	nodeRetry = 5 * time.Second
	// maxNodes is how many nodes are remembered.
	maxNodes = 16384
	// maxNode bounds what the API server answers about a node, in bytes.
	maxNode = 4 << 20
)

// ErrNodes is the error of a token whose node's addresses can't be fetched.
var ErrNodes = errors.New("can't fetch the addresses of the token's node")

// errNoNode is the error of a node that the cluster does not have.
var errNoNode = errors.New("the cluster has no such node")

// nodes knows the addresses of a cluster's nodes from its API server. It is safe for
// concurrent use.
type nodes struct {
	url    string // of all nodes
	client *http.Client
	flight singleflight.Group

	mu    sync.Mutex
	known map[string]*nodeAddresses
}

// nodeAddresses are where a node's tokens may come from, or why that is not known.
type nodeAddresses struct {
	prefixes []netip.Prefix
	err      error
	at       time.Time // when they were asked for
	due      time.Time // to be asked for again
}

func (a *nodeAddresses) has(ip netip.Addr) bool {
	return slices.ContainsFunc(a.prefixes, func(p netip.Prefix) bool { return p.Contains(ip) })
}

// check returns an error unless an address, HOST:PORT, is a node's own or of the network of
// its pods.
func (n *nodes) check(ctx context.Context, node, address string) error {
	from, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil // a unix socket
	}
	ip := from.Addr().Unmap().WithZone("")
	n.mu.Lock()
	a := n.known[node]
	n.mu.Unlock()
	if now := time.Now(); a == nil || now.After(a.due) || !a.has(ip) && now.Sub(a.at) > nodeRetry {
		if a, err = n.get(ctx, node); err != nil {
			return err
		}
	}
	if a.err != nil {
		return fmt.Errorf("node %s: %w", node, a.err)
	}
	if !a.has(ip) {
		return fmt.Errorf("the token is for node %s, and %s is not one of its addresses", node, ip)
	}
	return nil
}

// get asks for a node's addresses. Concurrent calls share one request. If it fails, what was
// known before counts.
func (n *nodes) get(ctx context.Context, node string) (*nodeAddresses, error) {
	found := n.flight.DoChan(node, func() (any, error) {
		prefixes, err := n.fetch(context.WithoutCancel(ctx), node)
		now := time.Now()
		a := &nodeAddresses{prefixes, err, now, now.Add(nodeTTL)}
		n.mu.Lock()
		defer n.mu.Unlock()
		if err != nil {
			a.due = now.Add(nodeRetry)
			if was := n.known[node]; was != nil && was.err == nil && !errors.Is(err, errNoNode) {
				a.prefixes, a.err = was.prefixes, nil
			}
		}
		if n.known == nil || len(n.known) >= maxNodes {
			n.known = make(map[string]*nodeAddresses)
		}
		n.known[node] = a
		return a, nil
	})
	select {
	case r := <-found:
		return r.Val.(*nodeAddresses), nil
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", ErrNodes, ctx.Err())
	}
}

func (n *nodes) fetch(ctx context.Context, node string) ([]netip.Prefix, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(n.url, "/")+"/"+url.PathEscape(node), nil)
	if err != nil {
		return nil, err
	}
	resp, err := n.client.Do(r)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNodes, err)
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound:
		return nil, errNoNode
	case http.StatusForbidden:
		return nil, fmt.Errorf("%w: nodes-url: copilot may not get nodes: give its service account the right to", ErrNodes)
	default:
		return nil, fmt.Errorf("%w: nodes-url: %s", ErrNodes, resp.Status)
	}
	var object struct {
		Spec struct {
			PodCIDRs []netip.Prefix `json:"podCIDRs"`
		} `json:"spec"`
		Status struct {
			Addresses []struct {
				Address string `json:"address"` // or a host name
			} `json:"addresses"`
		} `json:"status"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxNode)).Decode(&object); err != nil {
		return nil, fmt.Errorf("%w: nodes-url: %w", ErrNodes, err)
	}
	prefixes := object.Spec.PodCIDRs
	for _, address := range object.Status.Addresses {
		if ip, err := netip.ParseAddr(address.Address); err == nil {
			prefixes = append(prefixes, netip.PrefixFrom(ip.Unmap(), ip.Unmap().BitLen()))
		}
	}
	return prefixes, nil
}

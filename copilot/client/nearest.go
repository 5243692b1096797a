package client

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ctrlplane/pilot/internal/errline"
)

const (
	// A client that lives for a moment, as that of one layer key does, only
	// goes by the order of its brokers.
	measureFirst = time.Second
	measureEvery = 5 * time.Minute
	probeWithin  = 3 * time.Second

	firstAvoid = 2 * time.Second // after a failure; doubled with each that follows
	mostAvoid  = 2 * time.Minute

	notMeasured = time.Duration(math.MaxInt64)
)

// health is what is known of a broker from one call to the next.
type health struct {
	mu       sync.Mutex
	rtt      time.Duration // moving average of the time in which it answers a probe, or notMeasured
	down     bool          // it is avoided until a probe or a call succeeds
	failures int           // calls and probes since the last call that succeeded
	probeAt  time.Time
	probing  bool
}

// nearest returns the brokers in the order in which they are to be asked: the nearest
// first, in the configured order those that are not measured yet, and last those that
// failed. It starts the probes that are due.
func (c *Client) nearest() []*candidate {
	list := make([]*candidate, len(c.brokers))
	for i, b := range c.brokers {
		list[i] = &candidate{endpoint: b}
		if len(c.brokers) > 1 {
			list[i].avoided, list[i].distance = b.look()
		}
	}
	slices.SortStableFunc(list, func(a, b *candidate) int {
		if a.avoided != b.avoided {
			if a.avoided {
				return 1
			}
			return -1
		}
		return cmp.Compare(a.distance, b.distance)
	})
	return list
}

// look returns what is known, and starts a probe in the background if it is
// time for one.
func (b *endpoint) look() (avoided bool, distance time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.probing && time.Now().After(b.probeAt) {
		b.probing = true
		go func() {
			rtt, err := b.probe(context.Background())
			b.probed(rtt, err)
		}()
	}
	return b.down, b.rtt
}

// succeeded records that a call was answered.
func (b *endpoint) succeeded() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.down, b.failures = false, 0
}

// failed records that a call got no usable answer.
func (b *endpoint) failed() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.avoid()
}

// avoid moves the broker to the end of the order until it answers again.
func (b *endpoint) avoid() {
	d := min(mostAvoid, firstAvoid<<min(b.failures, 10))
	b.down = true
	b.failures++
	b.probeAt = time.Now().Add(d/2 + rand.N(d/2)) // so that nodes do not all probe at the same time
}

// probed records the result of a probe. It keeps the count of failures: a broker that
// answers probes may still fail calls.
func (b *endpoint) probed(rtt time.Duration, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.probing = false
	if err != nil {
		b.avoid()
		return
	}
	b.down = false
	b.probeAt = time.Now().Add(measureEvery)
	if b.rtt == notMeasured {
		b.rtt = rtt
	} else {
		b.rtt = (3*b.rtt + rtt) / 4
	}
}

// probe asks a broker how it is. One of the original has no such path, and says
// so. What else answers in a broker's place is none. The time is that of an
// answer over a connection that exists.
func (b *endpoint) probe(ctx context.Context) (rtt time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, probeWithin)
	defer cancel()
	u := *b.base
	u.Path = strings.TrimSuffix(u.Path, originalPath) + "/healthz"
	for range 2 {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
		if err != nil {
			return 0, err
		}
		start := time.Now()
		resp, err := b.http.Do(req)
		if err != nil {
			return 0, withoutURL(err)
		}
		rtt = time.Since(start)
		io.Copy(io.Discard, io.LimitReader(resp.Body, maxAnswer))
		resp.Body.Close()
		if resp.StatusCode != http.StatusNoContent && !(b.original && resp.StatusCode == http.StatusNotFound) {
			return 0, errors.New(stranger(resp, "204 No Content"))
		}
	}
	return rtt, nil
}

// BrokerCertificate is the certificate that the broker at URL shows.
type BrokerCertificate struct {
	URL         string
	Certificate *x509.Certificate
}

// Certificates returns the certificates of the brokers that show one which is
// accepted.
func (c *Client) Certificates(ctx context.Context) []BrokerCertificate {
	found := make([]*x509.Certificate, len(c.brokers))
	var wg sync.WaitGroup
	for i, b := range c.brokers {
		if b.base.Scheme == "https" {
			wg.Go(func() { found[i] = b.certificate(ctx) })
		}
	}
	wg.Wait()
	var list []BrokerCertificate
	for i, cert := range found {
		if cert != nil {
			list = append(list, BrokerCertificate{c.brokers[i].url, cert})
		}
	}
	return list
}

// certificate returns the certificate that the broker shows, or nil if it shows none
// that is accepted.
func (b *endpoint) certificate(ctx context.Context) *x509.Certificate {
	ctx, cancel := context.WithTimeout(ctx, probeWithin)
	defer cancel()
	host := b.base.Host
	if b.base.Port() == "" {
		host = net.JoinHostPort(b.base.Hostname(), "443")
	}
	conf := b.http.Transport.(*http.Transport).TLSClientConfig.Clone()
	conn, err := (&tls.Dialer{Config: conf}).DialContext(ctx, "tcp", host)
	if err != nil {
		return nil
	}
	defer conn.Close()
	return conn.(*tls.Conn).ConnectionState().PeerCertificates[0]
}

// Check returns, in one line, why brokers do not answer, and nil if all do.
func (c *Client) Check(ctx context.Context) error {
	errs := make([]error, len(c.brokers))
	var wg sync.WaitGroup
	for i, b := range c.brokers {
		wg.Go(func() {
			if _, err := b.probe(ctx); err != nil {
				errs[i] = fmt.Errorf("%s does not answer: %w", b, err)
			}
		})
	}
	wg.Wait()
	return errline.Join(errs...)
}

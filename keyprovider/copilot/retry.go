package copilot

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"strconv"
	"syscall"
	"time"
)

// backOff waits between the tries of one call: a random time of up to 100 ms,
// doubled each time, so that many nodes do not come back all at once.
type backOff struct {
	made int // tries so far
}

// wait waits before another try, at least for after. It reports false if there
// is to be none: three were made, or ctx will not last.
func (b *backOff) wait(ctx context.Context, after time.Duration) bool {
	b.made++
	if b.made >= maxTries {
		return false
	}
	d := max(after, rand.N(firstBackOff<<(b.made-1)))
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < d {
		return false
	}
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// retryOf says whether the broker may answer better next time.
func retryOf(resp *http.Response) retry {
	switch resp.StatusCode {
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
	default:
		return retry{}
	}
	r := retry{possible: true}
	if seconds, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && seconds > 0 {
		r.after = time.Duration(min(seconds, 3600)) * time.Second
	}
	return r
}

// permanent reports whether a connection failed for a reason that will still
// hold in a moment: certificates, or a socket that is not there.
func permanent(err error) bool {
	var (
		verification *tls.CertificateVerificationError
		authority    x509.UnknownAuthorityError
		hostname     x509.HostnameError
		alert        tls.AlertError
		record       tls.RecordHeaderError
	)
	return errors.As(err, &verification) || errors.As(err, &authority) || errors.As(err, &hostname) ||
		errors.As(err, &alert) || errors.As(err, &record) ||
		errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.EACCES)
}

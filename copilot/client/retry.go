package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"
)

const (
	maxTries     = 6
	firstBackOff = 100 * time.Millisecond
)

// backOff waits between the tries of one call: a random time of up to 100 ms,
// doubled each time, so that many nodes do not come back all at once. The tries
// last for some 1.5 seconds, in which a broker may be restarted.
type backOff struct {
	most int // tries
	made int // so far
}

// wait waits before another try, and for after before that, which a broker may
// have said to many. It reports false if there
// is to be none: enough were made, or ctx will not last.
func (b *backOff) wait(ctx context.Context, after time.Duration) bool {
	b.made++
	if b.made >= b.most {
		return false
	}
	d := max(after, 0) + rand.N(firstBackOff<<(b.made-1))
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

// permanent returns nil unless a connection failed for a reason that will still
// hold in a moment, and then the error that says what it means: a certificate
// that one side does not accept, or something that is no TLS. withCert says
// whether there is a certificate to show the broker.
func permanent(err error, withCert bool) error {
	var (
		verification *tls.CertificateVerificationError
		authority    x509.UnknownAuthorityError
		hostname     x509.HostnameError
		record       tls.RecordHeaderError
		invalid      x509.CertificateInvalidError
		alert        *net.OpError
	)
	if errors.As(err, &alert) && alert.Op == "remote error" {
		// crypto/tls keeps the type of a peer's alert to itself.
		if text := alert.Error(); strings.Contains(text, "certificate") || strings.Contains(text, "access denied") {
			// Anybody on the way there can send this, so it is no "no".
			if !withCert {
				return fmt.Errorf("%w: the broker takes only clients that show a certificate: set broker-cert and broker-key, or, on the broker, the issuer of the tokens that it is to take ([issuers] in copilot.toml)", ErrUnavailable)
			}
			return fmt.Errorf("%w: %w", ErrUnavailable, ErrCertRejected)
		}
	}
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		return fmt.Errorf("%w: put a new one in the place of the broker's certificate, or set this machine's clock", ErrUnavailable)
	}
	if errors.As(err, &verification) || errors.As(err, &authority) || errors.As(err, &hostname) ||
		errors.As(err, &record) || errors.Is(err, http.ErrSchemeMismatch) || errors.Is(err, syscall.EACCES) {
		return ErrUnavailable
	}
	return nil
}

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
	"reflect"
	"slices"
	"syscall"
	"time"
)

const (
	maxTries     = 6
	firstBackOff = 100 * time.Millisecond
)

// backOff waits between the tries of one call: a random time of up to 100 ms,
// doubled each time, so that many nodes do not retry at the same time. The tries
// last for some 1.5 seconds, in which a broker may be restarted.
type backOff struct {
	most int // tries
	made int // so far
}

// wait waits before the next try, after first waiting for after, which a broker may
// have sent to many clients. It reports false if no try is left, or ctx ends first.
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

// permanent returns nil if a retry of a failed connection may succeed, or else an error
// that explains the failure: one side rejects the other's certificate, or the peer does
// not speak TLS. withCert reports whether the client has a certificate.
func permanent(err error, withCert bool) error {
	var (
		verification *tls.CertificateVerificationError
		authority    x509.UnknownAuthorityError
		hostname     x509.HostnameError
		record       tls.RecordHeaderError
		invalid      x509.CertificateInvalidError
	)
	if alert, ok := alertOf(err); ok && slices.Contains(refusesCertificate, alert) {
		// Anyone on the network path can send this, so it is not a denial.
		if !withCert {
			return fmt.Errorf("%w: the broker requires a client certificate: set broker-cert and broker-key, or, on the broker, the issuer of this client's tokens ([issuers] in copilot.toml)", ErrUnavailable)
		}
		return fmt.Errorf("%w: %w", ErrUnavailable, ErrCertRejected)
	}
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		return fmt.Errorf("%w: renew the broker's certificate, or correct this machine's clock", ErrUnavailable)
	}
	if errors.As(err, &authority) {
		return fmt.Errorf("%w: no CA that is trusted here has issued its certificate: set broker-ca to copilot's ca.pem", ErrUnavailable)
	}
	if errors.As(err, &verification) || errors.As(err, &hostname) ||
		errors.As(err, &record) || errors.Is(err, http.ErrSchemeMismatch) || errors.Is(err, syscall.EACCES) {
		return ErrUnavailable
	}
	return nil
}

// refusesCertificate are the TLS alerts with which a peer refuses a certificate, or wants
// one (RFC 8446, section 6, and RFC 6066, section 9): bad_certificate to
// certificate_unknown, unknown_ca, access_denied, certificate_unobtainable,
// bad_certificate_status_response, bad_certificate_hash_value, certificate_required.
var refusesCertificate = []uint8{42, 43, 44, 45, 46, 48, 49, 111, 113, 114, 116}

// alertOf returns the number of the TLS alert with which a peer ended a connection.
// crypto/tls does not export the type of it, which is a number of 8 bits.
func alertOf(err error) (alert uint8, ok bool) {
	e, ok := errors.AsType[*net.OpError](err)
	if !ok || e.Op != "remote error" {
		return 0, false
	}
	v := reflect.ValueOf(e.Err)
	if v.Kind() != reflect.Uint8 {
		return 0, false
	}
	return uint8(v.Uint()), true
}

package doctor

import (
	"context"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/errline"
)

const (
	// warnBefore is how long before a certificate's expiry the doctor warns, as the alerts do.
	warnBefore = 14 * 24 * time.Hour
	// shortLife is the longest life of certificates that are replaced by themselves, as those
	// that copilot issues itself for a week, and SPIRE's.
	shortLife = 8 * 24 * time.Hour
)

// warnTime returns how long before a certificate's expiry the doctor warns.
func warnTime(cert *x509.Certificate) time.Duration {
	// Those that replace it begin when a third or half of its life is left.
	if life := cert.NotAfter.Sub(cert.NotBefore); life <= shortLife {
		return life / 4
	}
	return warnBefore
}

func (e *examination) certificatesCheck() []check {
	shown := slices.ContainsFunc(e.BrokerURLs, func(u string) bool { return strings.HasPrefix(u, "https:") })
	if e.BrokerCert == "" && !shown {
		return nil
	}
	return []check{{StepCertificates, []string{StepConfiguration}, 5 * time.Second, e.certificates}}
}

// certificates checks when the certificates of pilot and its brokers expire.
func (e *examination) certificates(ctx context.Context) Step {
	step := Step{Result: OK}
	var details []string
	look := func(what string, cert *x509.Certificate, fix, late []string) {
		expires := cert.NotAfter
		detail := fmt.Sprintf("%s expires on %s", what, expires.UTC().Format(time.RFC3339))
		switch left := time.Until(expires); {
		case left <= 0:
			step.Result, fix = Failed, late
			detail = fmt.Sprintf("%s has expired on %s", what, expires.UTC().Format(time.RFC3339))
		case left < warnTime(cert):
			if step.Result == OK {
				step.Result = Warning
			}
		default:
			fix = nil
		}
		details = append(details, detail)
		step.Fix = append(step.Fix, fix...)
	}
	var errs []error
	if e.BrokerCert != "" {
		if certs, err := certfile.Certificates(e.BrokerCert); err != nil {
			errs = append(errs, err)
		} else {
			look("broker-cert", certs[0], append([]string{"pilot node renew"}, e.newCertificate()...), e.newCertificate())
		}
	}
	if e.BrokerCA != "" {
		if certs, err := certfile.Certificates(e.BrokerCA); err != nil {
			errs = append(errs, err)
		} else {
			// While a CA is being replaced there are two, and the old one may expire soon.
			last := certs[0]
			for _, c := range certs {
				if c.NotAfter.After(last.NotAfter) {
					last = c
				}
			}
			rotate := []string{onBroker("copilot certs rotate-ca"), "copy /etc/copilot/ca.pem of the broker's machine to " + e.BrokerCA}
			look("broker-ca", last, rotate, rotate)
		}
	}
	// StepBroker reports why a broker's certificate is not accepted.
	for _, c := range e.Brokers.Certificates(ctx) {
		look("the certificate of "+c.URL, c.Certificate, []string{renewServer}, []string{renewServer})
	}
	if err := errline.Join(errs...); err != nil {
		return failed(err.Error(), "correct broker-cert and broker-ca in "+e.Configuration)
	}
	if len(details) == 0 {
		return skipped("no broker presents a certificate now")
	}
	step.Detail, step.Fix = strings.Join(details, "; "), unique(step.Fix)
	return step
}

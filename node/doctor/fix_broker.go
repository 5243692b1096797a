package doctor

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/certfile"
)

// onBroker is a command to run on the broker's machine.
func onBroker(command string) string { return "on the broker's machine: " + command }

var (
	restartCopilot = onBroker("systemctl restart copilot.service")
	copilotLog     = onBroker("journalctl -u copilot.service -n 30")
)

const compareClocks = "date -u (on this machine and on the broker's: compare the clocks)"

// brokerFix returns the fix for a broker that returned err instead of a KEK. With several
// brokers, err may be several errors, each with its own fix.
func (e *examination) brokerFix(kek string, err error) (fix []string) {
	add := func(commands ...string) { fix = append(fix, commands...) }
	fix = e.certificateFix(err)
	add(e.connectionFix(err)...)
	switch {
	case errors.Is(err, client.ErrNoVersion):
		add(onBroker("copilot keys show " + kek))
	case errors.Is(err, client.ErrNotFound):
		add(onBroker("copilot keys create " + kek))
	case errors.Is(err, client.ErrForbidden):
		action := "unwrap"
		if e.Brokers.Original() {
			action = "export"
		}
		add(onBroker(fmt.Sprintf("copilot policy check %s %s %s", e.identity(), kek, action)))
	case len(fix) > 0:
	case errors.Is(err, client.ErrUnavailable):
		add(copilotLog, onBroker("copilot keys show "+kek))
	default:
		add("journalctl -u pilot.service -n 30")
	}
	return unique(fix)
}

// certificateFix is brokerFix for errors of a certificate.
func (e *examination) certificateFix(err error) (fix []string) {
	add := func(commands ...string) { fix = append(fix, commands...) }
	var (
		authority x509.UnknownAuthorityError
		hostname  x509.HostnameError
		invalid   x509.CertificateInvalidError
	)
	if errors.Is(err, client.ErrCertExpired) {
		add(e.newCertificate()...)
	}
	if errors.Is(err, client.ErrCertNotYetValid) {
		add(compareClocks)
	}
	if errors.Is(err, client.ErrCertRejected) && len(fix) == 0 {
		add("openssl x509 -noout -issuer -subject -dates -in "+e.BrokerCert,
			onBroker("copilot certs list (the issuer has to be a CA in tls-client-ca)"), copilotLog)
	}
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		add(renewServer, compareClocks)
	}
	if errors.As(err, &authority) {
		if e.BrokerCA == "" {
			add("set broker-ca in " + e.Configuration + " to a copy of /etc/copilot/ca.pem of the broker's machine")
		} else {
			add("copy /etc/copilot/ca.pem of the broker's machine to " + e.BrokerCA)
		}
		add(restartPilot[0])
	}
	if errors.As(err, &hostname) {
		names := hostname.Certificate.DNSNames
		for _, ip := range hostname.Certificate.IPAddresses {
			names = append(names, ip.String())
		}
		add(fmt.Sprintf("correct broker in %s: its certificate is for %s", e.Configuration, strings.Join(names, ", ")),
			onBroker("copilot enroll --host "+hostname.Host+" --out NEW server"))
	}
	return fix
}

// renewServer renews a broker's certificate.
var renewServer = onBroker("copilot certs renew /etc/copilot/server.pem")

// newCertificate returns how to replace the node's certificate after it has expired.
func (e *examination) newCertificate() []string {
	name := filepath.Base(e.BrokerCert)
	return []string{
		fmt.Sprintf("copy %s to the broker's machine, as %s", e.BrokerCert, name),
		onBroker("copilot certs renew " + name),
		"copy it back to " + e.BrokerCert,
	}
}

// connectionFix is brokerFix for a broker that can't be reached.
func (e *examination) connectionFix(err error) (fix []string) {
	add := func(commands ...string) { fix = append(fix, commands...) }
	var (
		dns     *net.DNSError
		record  tls.RecordHeaderError
		timeout net.Error
	)
	correct := "correct broker in " + e.Configuration
	switch {
	case errors.As(err, &dns):
		add("getent hosts "+dns.Name, correct)
	case errors.As(err, &record), errors.Is(err, http.ErrSchemeMismatch):
		add(correct + ": the server there does not speak TLS")
	case errors.Is(err, syscall.EACCES):
		add("ls -l " + strings.Join(e.BrokerURLs, " "))
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
		add(restartCopilot, copilotLog)
		for _, u := range e.BrokerURLs {
			if parsed, err := url.Parse(u); err == nil && parsed.Scheme == "https" && parsed.Port() == "" {
				add(fmt.Sprintf("%s: %s is port 443, and copilot's default is 8443", correct, u))
			}
		}
	case errors.As(err, &timeout) && timeout.Timeout(), errors.Is(err, context.DeadlineExceeded),
		errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.ETIMEDOUT):
		for _, u := range e.BrokerURLs {
			if parsed, err := url.Parse(u); err == nil && parsed.Host != "" {
				add("curl -sSo /dev/null " + u + "/healthz (does a firewall drop it?)")
			}
		}
		add(restartCopilot, copilotLog)
	}
	return fix
}

// identity returns the node's identity at the broker, or a placeholder if it is not known
// here.
func (e *examination) identity() string {
	if e.BrokerCert != "" {
		if cert, err := certfile.Certificates(e.BrokerCert); err == nil {
			for _, u := range cert[0].URIs {
				return u.String()
			}
		}
	} else if len(e.BrokerURLs) > 0 && strings.HasPrefix(e.BrokerURLs[0], "unix:") {
		return "uid:0"
	}
	return "IDENTITY"
}

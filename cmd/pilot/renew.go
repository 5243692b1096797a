package main

import (
	"context"
	"errors"
	"fmt"
	brokerclient "github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/copilot/pki"
	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v3"
	"math/rand/v2"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

var renewCommand = &cli.Command{
	Name:  "renew",
	Usage: "have copilot renew this machine's broker-cert",
	Description: `Creates a new private key, has copilot issue a certificate for it with the name of
the current one, which must still be valid, and replaces both files. They keep
their owner and mode, and pilot uses them for its next connection. copilot must
be configured for this: see "Renew by themselves" in docs/copilot.md.

pilot serve does this by itself when a third of the certificate's lifetime is left.

Example:
   pilot node renew`,
	Flags:  configFlags(brokerSettings...),
	Action: renew,
}

func renew(ctx context.Context, c *cli.Command) error {
	if err := nodeArguments(c); err != nil {
		return err
	}
	conf, err := loadConfiguration(c)
	if err != nil {
		return err
	}
	if conf.BrokerCert == "" {
		return exit.Usagef("broker-cert is not set, so there is no certificate to renew")
	}
	client, err := conf.client()
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	cert, err := client.RenewCertificate(ctx)
	if err != nil {
		return fmt.Errorf("%w%s", err, remedy(err, conf))
	}
	var names []string
	for _, u := range cert.URIs {
		names = append(names, u.String())
	}
	fmt.Printf("%s: %s, valid until %s\n", conf.BrokerCert, strings.Join(names, ", "), cert.NotAfter.UTC().Format(time.RFC3339))
	return nil
}

// remedy returns how else to renew a certificate, or "".
func remedy(err error, conf configuration) string {
	if errors.Is(err, brokerclient.ErrCertExpired) {
		return fmt.Sprintf(": the expired certificate can't authenticate its own renewal. On the broker's machine run \"copilot certs renew\" with a copy of %s, and copy the result back: the key stays here", conf.BrokerCert)
	}
	return ""
}

// A certificate is renewed when renewAt of its lifetime is left, or up to renewSpread
// earlier, at random, so that nodes that were enrolled together spread their renewals.
const (
	renewAt     = 1.0 / 3
	renewSpread = 1.0 / 12
)

// renewCertificates renews broker-cert in time, until ctx is done, if copilot issued it.
// Certificates of other CAs are renewed by other means.
func (r *reloadable) renewCertificates(ctx context.Context) {
	var serial, warned string
	var warnedAt time.Time
	// warn logs each reason once a day.
	warn := func(conf configuration, err error) {
		if text := err.Error(); text != warned || time.Since(warnedAt) > 24*time.Hour {
			warned, warnedAt = text, time.Now()
			logrus.WithError(err).WithField("certificate", conf.BrokerCert).Warn("broker-cert not renewed, retrying until it expires")
		}
	}
	early := 0.0
	for wait := time.Duration(0); ; {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
		conf := r.configuration()
		wait = time.Minute
		if conf.BrokerCert == "" {
			continue
		}
		if err := certfile.CompletePair(conf.BrokerCert, conf.BrokerKey); err != nil {
			warn(conf, err)
			continue // nothing could be written now, either
		}
		pair, err := certfile.Load(conf.BrokerCert, conf.BrokerKey)
		if err != nil {
			continue // each connection reports it
		}
		cert := pair.Certificate().Leaf
		if !strings.HasPrefix(cert.Issuer.CommonName, "copilot ") {
			continue
		}
		if s := cert.SerialNumber.String(); s != serial {
			serial, early, warned = s, renewSpread*rand.Float64(), ""
		}
		span := cert.NotAfter.Sub(cert.NotBefore.Add(pki.Backdate))
		due := cert.NotAfter.Add(-time.Duration((renewAt + early) * float64(span)))
		// Often enough to notice a replaced file or a changed clock.
		wait = min(max(span/500, time.Second), 10*time.Minute)
		if time.Now().Before(due) || time.Now().After(cert.NotAfter) {
			continue
		}
		err = conf.renew(ctx)
		if err == nil || ctx.Err() != nil {
			continue
		}
		// Many attempts before it expires, spread over time for many nodes.
		wait = min(max(span/200, time.Second), time.Hour)
		wait = wait/2 + rand.N(wait)
		warn(conf, fmt.Errorf("it expires on %s: %w", cert.NotAfter.UTC().Format(time.RFC3339), err))
	}
}

// renew renews broker-cert with a new client, and so over new connections.
func (c *configuration) renew(ctx context.Context) error {
	client, err := c.client()
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	cert, err := client.RenewCertificate(ctx)
	if err != nil {
		return err
	}
	logrus.WithFields(logrus.Fields{"certificate": c.BrokerCert, "until": cert.NotAfter.UTC().Format(time.RFC3339)}).Info("broker-cert renewed")
	return nil
}

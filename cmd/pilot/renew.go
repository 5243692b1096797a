package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/copilot/pki"
	"github.com/ctrlplane/pilot/internal/certfile"
)

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
	client, err := c.Client()
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

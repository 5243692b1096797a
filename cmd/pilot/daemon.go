package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
	"time"

	sdnotify "github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v3"
	"golang.org/x/sync/errgroup"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/status"
	"github.com/ctrlplane/pilot/internal/tracing"
	"github.com/ctrlplane/pilot/keyprovider"
)

// logInterval is how often the log says how many layer keys were wrapped and unwrapped.
const logInterval = time.Minute

// daemon is what "pilot serve" and "pilot mirror" have in common.
type daemon struct {
	conf     configuration
	provider *reloadable
	registry *prometheus.Registry
	group    *errgroup.Group // of the servers
}

// runDaemon runs what start adds to the daemon's group, with a key provider, until a signal
// or an error ends it. Meanwhile it reloads the configuration on SIGHUP, and renews
// broker-cert.
func runDaemon(ctx context.Context, c *cli.Command, start func(ctx context.Context, d *daemon) error) error {
	if c.NArg() > 0 {
		return exit.Usagef("%s takes no argument, and got %q", c.Name, c.Args().First())
	}
	conf, err := loadConfiguration(c)
	if err != nil {
		return err
	}
	d := &daemon{conf: conf, registry: newRegistry()}
	d.provider = &reloadable{metrics: keyprovider.NewMetrics(d.registry)}
	if err := d.provider.use(ctx, conf); err != nil {
		return err
	}
	d.registry.MustRegister(status.Certificates("pilot_cert_not_after_seconds", d.provider.certificates))
	stopTracing, err := tracing.Start(ctx, "pilot")
	if err != nil {
		return exit.UsageError(err)
	}
	defer endTracing(stopTracing)
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	d.group, ctx = errgroup.WithContext(ctx)
	if err := start(ctx, d); err != nil {
		return err
	}
	go d.provider.onHangup(ctx, c, hangup)
	go d.provider.renewCertificates(ctx)
	go logUses(ctx, d.provider.metrics)
	defer d.provider.metrics.LogUses()
	if _, err := sdnotify.SdNotify(false, sdnotify.SdNotifyReady); err != nil {
		logrus.WithError(err).Warn("systemd not notified")
	}
	return d.group.Wait()
}

// logUses logs how many layer keys were wrapped and unwrapped until ctx is done.
func logUses(ctx context.Context, m *keyprovider.Metrics) {
	tick := time.NewTicker(logInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			m.LogUses()
		case <-ctx.Done():
			return
		}
	}
}

// tracesTimeout is how long pilot waits, when it stops, for a collector to accept the
// last spans.
const tracesTimeout = 2 * time.Second

func endTracing(stop func(context.Context) error) {
	ctx, cancel := context.WithTimeout(context.Background(), tracesTimeout)
	defer cancel()
	if err := stop(ctx); err != nil {
		logrus.WithError(err).Warn("last traces not sent")
	}
}

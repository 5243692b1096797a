// Package watchdog notifies systemd's watchdog while a service is healthy.
package watchdog

import (
	"context"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/sirupsen/logrus"
)

// Run notifies systemd three times per WatchdogSec of the unit, each time that healthy
// returns no error within that interval, until ctx is done. systemd restarts a service
// that sends no notification in time. Run returns immediately if no watchdog is set.
func Run(ctx context.Context, healthy func(context.Context) error) {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		logrus.WithError(err).Warn("watchdog not enabled")
	}
	if interval == 0 {
		return
	}
	interval /= 3
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		if err := withTimeout(ctx, interval, healthy); ctx.Err() != nil {
			return
		} else if err != nil {
			logrus.WithError(err).Error("health check failed; watchdog not notified")
		} else if _, err := daemon.SdNotify(false, daemon.SdNotifyWatchdog); err != nil {
			logrus.WithError(err).Warn("watchdog can't be notified")
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func withTimeout(ctx context.Context, d time.Duration, healthy func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	return healthy(ctx)
}

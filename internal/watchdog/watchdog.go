// Package watchdog tells systemd's watchdog that a service still answers.
package watchdog

import (
	"context"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/sirupsen/logrus"
)

// Run tells systemd, three times as often as the unit's WatchdogSec asks for,
// that the service lives, if alive says so, until ctx is done. systemd restarts
// a service that it does not hear of. Run returns at once where no watchdog is
// set.
func Run(ctx context.Context, alive func(context.Context) error) {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		logrus.WithError(err).Warn("there is no watchdog")
	}
	if interval == 0 {
		return
	}
	interval /= 3
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		if err := within(ctx, interval, alive); ctx.Err() != nil {
			return
		} else if err != nil {
			logrus.WithError(err).Error("the watchdog is not told that this lives")
		} else if _, err := daemon.SdNotify(false, daemon.SdNotifyWatchdog); err != nil {
			logrus.WithError(err).Warn("the watchdog can't be told that this lives")
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func within(ctx context.Context, d time.Duration, alive func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	return alive(ctx)
}

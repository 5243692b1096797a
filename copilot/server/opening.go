package server

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/server/auditing"
)

// openInterval is how often opening a database that is away is tried again.
const openInterval = 2 * time.Second

// tryOpen opens the store. A database that is away, or that does not let copilot in, is
// not an error: the broker stays closed, and waiting says why. A reason is logged again
// only after another one.
func (b *broker) tryOpen(ctx context.Context, conf Config) error {
	err := b.open(ctx, conf)
	if err == nil {
		if created := describeCreated(conf, b.keks.Store); created != "" {
			logrus.Warn(created)
		}
		return nil
	}
	if ctx.Err() != nil || conf.Database == "" || !errors.Is(err, keystore.ErrDatabase) && !errors.Is(err, audit.ErrUnavailable) {
		return err
	}
	reason := err.Error()
	if before := b.waiting.Swap(&reason); before == nil || *before != reason {
		logrus.WithError(err).Error("not ready: the database can't be used: retrying every " + openInterval.String())
		daemon.SdNotify(false, "STATUS=not ready: "+reason)
	}
	return nil
}

// awaitOpen tries to open the store until that succeeds, or ctx is done.
func (b *broker) awaitOpen(ctx context.Context, conf Config) error {
	if b.opened.Load() {
		return nil
	}
	tick := time.NewTicker(openInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		// Decisions begin with the current policy.
		b.reload(false)
		if err := b.tryOpen(ctx, conf); ctx.Err() != nil {
			return nil
		} else if err != nil {
			return err
		}
		if b.opened.Load() {
			logrus.Info("the database is available: ready")
			daemon.SdNotify(false, "STATUS=")
			return nil
		}
	}
}

// notOpen is the error of a request before the store is open.
type notOpen struct{ reason string }

func (n *notOpen) Error() string { return "copilot is not ready: " + n.reason }

// refuseNotOpen answers a request before the store is open. The audit log is not open
// either, and nothing was decided. Only the owner learns the reason.
func (a *api) refuseNotOpen(w http.ResponseWriter, e *auditing.Entry, start time.Time) {
	err := &notOpen{"its database can't be used, see its log"}
	if reason := a.waiting.Load(); a.owner && reason != nil {
		err.reason = *reason + " (tried again every " + openInterval.String() + ")"
	}
	e.Status, e.Verdict = http.StatusServiceUnavailable, audit.Failed
	a.metrics.request(e, time.Since(start))
	writeAnswer(w, e, nil, err)
}

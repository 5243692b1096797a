package server

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/keystore"
)

// openInterval is how often a database is tried that could not be opened.
const openInterval = 2 * time.Second

// tryOpen opens the store. A database that is away, or that does not let copilot
// in, is no error: the broker is not open then, and waiting says why. Each reason is
// logged once, until there is another.
func (b *broker) tryOpen(ctx context.Context, conf Config) error {
	err := b.open(ctx, conf)
	if err == nil {
		if made := store(conf, b.keks.store); made != "" {
			logrus.Warn(made)
		}
		return nil
	}
	if ctx.Err() != nil || conf.Database == "" || !errors.Is(err, keystore.ErrDatabase) && !errors.Is(err, audit.ErrUnavailable) {
		return err
	}
	reason := err.Error()
	if before := b.waiting.Swap(&reason); before == nil || *before != reason {
		logrus.WithError(err).Error("not ready: the database can't be used, and is tried again every " + openInterval.String())
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
		// What is decided from then on is decided by the policy of now.
		b.reload(false)
		if err := b.tryOpen(ctx, conf); ctx.Err() != nil {
			return nil
		} else if err != nil {
			return err
		}
		if b.opened.Load() {
			logrus.Info("the database can be used: ready")
			daemon.SdNotify(false, "STATUS=")
			return nil
		}
	}
}

// notOpen is the error of a request before the store is open.
type notOpen struct{ reason string }

func (n *notOpen) Error() string { return "copilot is not ready: " + n.reason }

// refuseNotOpen answers a request before the store is open. No audit log is open
// either, and nothing was decided. Only the owner learns more than that.
func (a *api) refuseNotOpen(w http.ResponseWriter, action string, start time.Time) {
	id := make([]byte, 8)
	rand.Read(id) // never fails
	err := &notOpen{"its database can't be used, see its log"}
	if reason := a.waiting.Load(); a.owner && reason != nil {
		err.reason = *reason + " (tried again every " + openInterval.String() + ")"
	}
	e := &entry{Entry: audit.Entry{Request: fmt.Sprintf("%x", id), Action: action, Verdict: audit.Failed, Status: http.StatusServiceUnavailable}}
	a.metrics.request(e, time.Since(start))
	writeAnswer(w, e, nil, err)
}

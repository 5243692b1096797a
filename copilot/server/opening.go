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
	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/server/auditing"
)

const (
	// openInterval is how often opening a database that is away is tried again.
	openInterval = 2 * time.Second
	// maxOpenInterval is how often unwrapping the master key is tried again at last: each
	// try after a failed one waits twice as long, from openInterval on.
	maxOpenInterval = 30 * time.Second
)

// errSealed says that the master key can't be unwrapped now.
var errSealed = errors.New("the master key can't be unwrapped")

// tryOpen opens the store. A database that is away, or that does not let copilot in, is
// not an error, nor is a KMS that does not unwrap the master key now: the broker stays
// closed, and waiting says why. A reason is logged again only after another one.
func (b *broker) tryOpen(ctx context.Context, conf Config) error {
	err := b.open(ctx, conf, b.checkAnchors)
	if err == nil {
		if created := describeCreated(conf, b.keks.Store); created != "" {
			logrus.Warn(created)
		}
		return nil
	}
	message := "not ready: the database can't be used: retrying every " + openInterval.String()
	switch {
	case ctx.Err() != nil:
		return err
	case isSealed(err):
		message = "not ready: the master key can't be unwrapped: retrying"
	case conf.Database == "" || !errors.Is(err, keystore.ErrDatabase) && !errors.Is(err, audit.ErrUnavailable):
		return err
	}
	before := b.waiting.Swap(&err)
	if before == nil || (*before).Error() != err.Error() {
		logrus.WithError(err).Error(message)
		daemon.SdNotify(false, "STATUS=not ready: "+err.Error())
	}
	return nil
}

// isSealed reports whether err is that of a master key that its KMS may unwrap later.
func isSealed(err error) bool {
	return errors.As(err, new(*keystore.SealedError)) && !errors.Is(err, kms.ErrUnwrap)
}

// notOpen returns why the store is not open yet, in words for everybody.
func (b *broker) notOpen() error {
	if reason := b.waiting.Load(); reason != nil && isSealed(*reason) {
		return errSealed
	}
	return keystore.ErrUnavailable
}

// awaitOpen tries to open the store until that succeeds, or ctx is done.
func (b *broker) awaitOpen(ctx context.Context, conf Config) error {
	if b.opened.Load() {
		return nil
	}
	for interval := openInterval; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(interval):
		}
		// Decisions begin with the current policy.
		b.reload(false)
		if err := b.tryOpen(ctx, conf); ctx.Err() != nil {
			return nil
		} else if err != nil {
			return err
		}
		if b.opened.Load() {
			logrus.Info("the store is open: ready")
			daemon.SdNotify(false, "STATUS=")
			return nil
		}
		if isSealed(*b.waiting.Load()) {
			interval = min(2*interval, maxOpenInterval)
		} else {
			interval = openInterval
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
	reason := a.waiting.Load()
	if reason != nil && isSealed(*reason) {
		err.reason = errSealed.Error() + ", see its log"
	}
	if a.owner && reason != nil {
		err.reason = (*reason).Error() + " (tried again within " + maxOpenInterval.String() + ")"
	}
	e.Status, e.Verdict = http.StatusServiceUnavailable, audit.Failed
	a.metrics.request(e, time.Since(start))
	writeAnswer(w, e, nil, err)
}

// Package server is a key broker: it keeps key encryption keys (KEKs), or
// reaches them in key management systems, hands them out over HTTP or wraps and
// unwraps with them for whom its policy allows, and writes down each request in
// an audit log.
package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/policy"
	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/exit"
)

// broker is what all listeners of a server share.
type broker struct {
	keks     *keyring
	audit    *audit.Log
	heads    *headNotes
	policy   *policy.File
	issuers  *issuers
	limits   *limits
	refusals *refusals
	renewals *limits
	nodeCA   *nodeCA // that renews clients' certificates; may be nil
	metrics  *metrics
	// clients are the CAs of their certificates; nil if they show none.
	clients   *certfile.Authorities
	anonymous bool // those who do not say who they are may ask, on loopback

	// opened says that the store and the audit log are open. Until then, nobody
	// else uses them.
	opened atomic.Bool
	// waiting is why they are not open yet.
	waiting  atomic.Pointer[string]
	stopping atomic.Bool
}

// newBroker opens what the configuration tells.
func newBroker(ctx context.Context, conf Config) (*broker, error) {
	b, err := closedBroker(conf)
	if err != nil {
		return nil, err
	}
	if err := b.open(ctx, conf); err != nil {
		return nil, err
	}
	return b, nil
}

// closedBroker returns a broker whose store is still to be opened.
func closedBroker(conf Config) (b *broker, err error) {
	if err := checkOwner(conf.Dir); err != nil {
		return nil, err
	}
	b = &broker{
		limits:    &limits{},
		renewals:  &limits{},
		metrics:   newMetrics(),
		anonymous: conf.InsecureLoopback && !conf.hasTLS(),
		keks:      &keyring{},
	}
	b.refusals = &refusals{write: func(e audit.Entry) error {
		if !b.opened.Load() {
			return nil
		}
		return b.audit.Write(e)
	}}
	if b.policy, err = openPolicy(conf); err != nil {
		return nil, exit.UsageError(err)
	}
	if b.issuers, err = newIssuers(conf.Issuers); err != nil {
		return nil, exit.UsageError(err)
	}
	return b, nil
}

// open opens the store, the audit log and the KMSs. If it fails, it can be called
// again.
func (b *broker) open(ctx context.Context, conf Config) (err error) {
	var opened broker
	opened.keks = &keyring{}
	defer func() {
		if err != nil {
			err = errors.Join(err, opened.close())
		}
	}()
	store, err := keystore.Open(ctx, conf.Dir, conf.Database)
	if err != nil {
		return err
	}
	opened.keks.store = store
	if opened.audit, err = openAudit(ctx, conf, store); err != nil {
		return err
	}
	keks, err := newKeyring(conf, store, opened.audit, b.metrics)
	if err != nil {
		return err
	}
	b.keks, b.audit = keks, opened.audit
	b.heads = &headNotes{log: b.audit, store: store, name: conf.AuditName()}
	b.metrics.auditLosses(b.audit.Losses)
	b.opened.Store(true)
	return nil
}

// checkOwner keeps root from making files in a store that belongs to the user
// that copilot's service runs as, who could not open them.
func checkOwner(dir string) error {
	info, err := os.Stat(dir)
	if err != nil || os.Geteuid() != 0 {
		return nil
	}
	uid := info.Sys().(*syscall.Stat_t).Uid
	if uid == 0 {
		return nil
	}
	name := strconv.FormatUint(uint64(uid), 10)
	if u, err := user.LookupId(name); err == nil {
		name = u.Username
	}
	return fmt.Errorf("the store in %s belongs to user %s: start its service first (systemctl start copilot), or run this as that user (runuser -u %[2]s -- copilot …)", dir, name)
}

func (b *broker) close() error {
	err := b.keks.close()
	if b.refusals != nil {
		b.refusals.look(time.Now(), true)
	}
	if b.heads != nil {
		b.heads.note(context.Background())
	}
	if b.keks.store != nil {
		err = errors.Join(err, b.keks.store.Close())
	}
	if b.audit != nil {
		err = errors.Join(err, b.audit.Close())
	}
	return err
}

func openPolicy(conf Config) (*policy.File, error) {
	if conf.Policy != "" {
		return policy.Open(conf.Policy, conf.IssuerNames())
	}
	who := []string{"uid:0", fmt.Sprintf("uid:%d", os.Getuid())}
	if conf.InsecureLoopback {
		who = append(who, anonymous)
	}
	return policy.Fixed(policy.Local(who...)), nil
}

// reload reads the policy again, if its file changed or always is true.
func (b *broker) reload(always bool) {
	changed, err := b.policy.Reload(always)
	if err != nil {
		b.metrics.policyUsable.Set(0)
		logrus.WithError(err).Error("the policy stays what it was: its file can't be used")
		return
	}
	if changed {
		b.policyRead()
		logrus.Info("policy read again")
	}
}

func (b *broker) policyRead() {
	b.metrics.policyUsable.Set(1)
	b.metrics.policyLoaded.SetToCurrentTime()
}

const (
	// policyEvery is how often the policy's file is looked at.
	policyEvery = 2 * time.Second
	// sweepEvery is how often keys are forgotten whose time has come.
	sweepEvery = time.Minute
)

// tend does what is to be done now and then, until ctx is done.
func (b *broker) tend(ctx context.Context, hangup <-chan os.Signal) {
	look, sweep := time.NewTicker(policyEvery), time.NewTicker(sweepEvery)
	defer look.Stop()
	defer sweep.Stop()
	b.sweep(ctx)
	for {
		select {
		case <-ctx.Done():
			return
		case <-hangup:
			b.reload(true)
			if err := b.audit.Reopen(); err != nil {
				logrus.WithError(err).Error("audit log not opened again: the file before is used")
			}
		case <-look.C:
			b.reload(false)
		case <-sweep.C:
			b.sweep(ctx)
		}
	}
}

func (b *broker) sweep(ctx context.Context) {
	err := b.keks.store.Sweep(ctx, func(k keystore.KEK) error {
		return b.audit.Write(audit.Entry{Action: "destroyed", KEK: k.ID, Who: "copilot", From: "copilot", Verdict: audit.Allowed, Reason: "the waiting time is over"})
	})
	if err != nil && ctx.Err() == nil {
		logrus.WithError(err).Error("keys that are to be destroyed are still there")
	}
}

var errStopping = errors.New("copilot is about to stop")

func (b *broker) ready(ctx context.Context) error {
	if b.stopping.Load() {
		return errStopping
	}
	if !b.opened.Load() {
		return keystore.ErrUnavailable
	}
	if err := b.keks.store.Ready(ctx); err != nil {
		logrus.WithError(err).Warn("not ready")
		return keystore.ErrUnavailable
	}
	if err := b.audit.Ready(); err != nil {
		logrus.WithError(err).Warn("not ready")
		return audit.ErrUnavailable
	}
	return nil
}

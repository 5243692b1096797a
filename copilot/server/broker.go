// Package server is the key broker: it keeps key encryption keys (KEKs), or reaches them
// in key management systems, exports them over HTTP, or wraps and unwraps with them, as
// its policy allows, and writes each use to an audit log.
//
// chain.go shows what a request passes. Each step is a package below: caller,
// authorization, ratelimit, auditing. Then comes the keyring. TLS is in handshake.
package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/policy"
	"github.com/ctrlplane/pilot/copilot/server/auditing"
	"github.com/ctrlplane/pilot/copilot/server/caller"
	"github.com/ctrlplane/pilot/copilot/server/keyring"
	"github.com/ctrlplane/pilot/copilot/server/ratelimit"
	"github.com/ctrlplane/pilot/internal/exit"
)

// broker is what all listeners of a server share.
type broker struct {
	callers  caller.Authenticator
	policy   *policy.File
	requests ratelimit.Requests
	renewals ratelimit.Requests
	audit    *auditing.Log
	keks     *keyring.Keyring // nil until it is open
	auditLog *audit.Log       // nil until it is open
	heads    *headNotes       // nil until it is open
	master   masterRotation
	nodeCA   *nodeCA      // renews clients' certificates; may be nil
	signer   publicSigner // of the public halves of KEKs
	metrics  *metrics

	// opened says that the store and the audit log are open. Before that, nothing else
	// uses them.
	opened atomic.Bool
	// waiting is why they are not open yet.
	waiting  atomic.Pointer[error]
	stopping atomic.Bool

	conf Config
	// least is how often the store was changed, by the audit log.
	least      int64
	rolledBack map[string]string // as last reported
}

// newBroker opens the broker of a configuration, for one command: it compares the records that
// are used.
func newBroker(ctx context.Context, conf Config) (*broker, error) {
	b, err := closedBroker(conf)
	if err != nil {
		return nil, err
	}
	if err := b.open(ctx, conf, func(ctx context.Context) error { return b.keks.Store.CheckGeneration(ctx, b.least) }); err != nil {
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
		conf:    conf,
		master:  masterRotation{begun: make(chan struct{}, 1)},
		audit:   auditing.New(),
		metrics: newMetrics(),
		signer:  publicSigner{conf.PublicKeysCert, conf.PublicKeysKey},
		callers: caller.Authenticator{AllowAnonymous: conf.InsecureLoopback && !conf.hasTLS()},
	}
	if b.policy, err = openPolicy(conf); err != nil {
		return nil, exit.UsageError(err)
	}
	if b.callers.Issuers, err = caller.NewIssuers(conf.Issuers); err != nil {
		return nil, exit.UsageError(err)
	}
	return b, nil
}

// open opens the store, the audit log and the KMSs, and calls check. It can be called again if
// it fails.
func (b *broker) open(ctx context.Context, conf Config, check func(context.Context) error) (err error) {
	store, err := keystore.Open(ctx, conf.Dir, conf.Database, conf.Wrapping()...)
	if err != nil {
		return err
	}
	log, err := openAudit(ctx, conf, store)
	if err != nil {
		return errors.Join(err, store.Close())
	}
	keks, err := keyring.New(keyring.Config{Backends: conf.Backends, KMS: conf.KMS, KEKs: conf.KEKs, WrapLimit: conf.WrapLimit}, store, b.audit, b.metrics.keyring)
	if err != nil {
		return errors.Join(err, store.Close(), log.Close())
	}
	b.keks, b.auditLog, b.least = keks, log, log.Counted()
	if err := check(ctx); err != nil {
		return errors.Join(err, keks.Close(), store.Close(), log.Close())
	}
	log.Count(store.Generation)
	b.heads = &headNotes{log: log, store: store, name: conf.AuditName()}
	b.metrics.auditLosses(log.Losses)
	b.audit.Open(log)
	b.opened.Store(true)
	return nil
}

func (b *broker) close() error {
	if !b.opened.Load() {
		return nil
	}
	err := b.keks.Close()
	b.audit.Flush()
	b.countChanges()
	b.heads.note(context.Background())
	return errors.Join(err, b.keks.Store.Close(), b.auditLog.Close())
}

func openPolicy(conf Config) (*policy.File, error) {
	if conf.Policy != "" {
		return policy.Open(conf.Policy, conf.PolicyIssuers())
	}
	who := []string{"uid:0", fmt.Sprintf("uid:%d", os.Getuid())}
	if conf.InsecureLoopback {
		who = append(who, caller.Anonymous)
	}
	return policy.Fixed(policy.Local(who...)), nil
}

// reload reads the policy again if its file has changed, or always is true.
func (b *broker) reload(always bool) {
	changed, err := b.policy.Reload(always)
	if err != nil {
		b.metrics.policyUsable.Set(0)
		logrus.WithError(err).Error("the policy file can't be used: the previous policy stays in force")
		return
	}
	if changed {
		b.policyRead()
		logrus.Info("policy reloaded")
	}
}

func (b *broker) policyRead() {
	for _, warning := range b.policy.Policy().Warnings {
		logrus.Warn("policy: " + warning)
	}
	b.metrics.policyUsable.Set(1)
	b.metrics.policyLoaded.SetToCurrentTime()
}

// policyInterval is how often the policy's file is checked for changes.
const policyInterval = 2 * time.Second

// tend does the periodic work, until ctx is done.
func (b *broker) tend(ctx context.Context, hangup <-chan os.Signal) {
	look, check := time.NewTicker(policyInterval), time.NewTicker(checkInterval)
	defer look.Stop()
	defer check.Stop()
	b.sweep(ctx)
	for {
		select {
		case <-ctx.Done():
			return
		case <-hangup:
			b.reload(true)
			if err := b.auditLog.Reopen(); err != nil {
				logrus.WithError(err).Error("can't reopen the audit log: the open file stays in use")
			}
		case <-look.C:
			b.reload(false)
		case <-check.C:
			b.countChanges()
			if err := b.checkAnchors(ctx); err != nil && ctx.Err() == nil {
				logrus.WithError(err).Error("can't check whether records were put back as they were earlier")
				continue
			}
			b.sweep(ctx)
		}
	}
}

func (b *broker) sweep(ctx context.Context) {
	err := b.keks.Store.Sweep(ctx, func(k keystore.KEK, versions []int) error {
		e := audit.Entry{Action: "destroyed", KEK: k.ID, Who: "copilot", From: "copilot", Verdict: audit.Allowed, Reason: "the waiting time is over"}
		if len(versions) == 1 {
			e.Version = versions[0]
		} else {
			e.Reason += " for the versions " + spans(versions)
		}
		return b.audit.Write(e)
	})
	if err != nil && ctx.Err() == nil {
		logrus.WithError(err).Error("can't destroy keys whose waiting time is over")
	}
}

// spans writes numbers that ascend, as in 1-3, 7.
func spans(numbers []int) string {
	text := ""
	for i, n := range numbers {
		isInside := i > 0 && n == numbers[i-1]+1
		switch {
		case isInside && i+1 < len(numbers) && numbers[i+1] == n+1:
		case isInside:
			text += fmt.Sprint("-", n)
		default:
			text += fmt.Sprint(", ", n)
		}
	}
	return strings.TrimPrefix(text, ", ")
}

var errStopping = errors.New("copilot is stopping")

func (b *broker) ready(ctx context.Context) error {
	if b.stopping.Load() {
		return errStopping
	}
	if !b.opened.Load() {
		return b.notOpen()
	}
	if err := b.keks.Store.Ready(ctx); err != nil {
		logrus.WithError(err).Warn("not ready")
		return keystore.ErrUnavailable
	}
	if err := b.auditLog.Ready(); err != nil {
		logrus.WithError(err).Warn("not ready")
		return audit.ErrUnavailable
	}
	return nil
}

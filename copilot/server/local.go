package server

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/policy"
	"github.com/ctrlplane/pilot/copilot/server/auditing"
	"github.com/ctrlplane/pilot/copilot/server/keyring"
)

// localTimeout bounds each call, which may take calls of a KMS.
const localTimeout = 30 * time.Second

// localKeys manages the KEKs of a store that this process has open. Each call is audited
// as that of the user that it runs as.
type localKeys struct {
	api     *api
	created string
}

func newLocalKeys(b *broker, conf Config) *localKeys {
	return &localKeys{&api{broker: b, owner: true}, describeCreated(conf, b.keks.Store)}
}

// describeCreated describes a store that was created, or returns "" if it existed.
func describeCreated(conf Config, s *keystore.Store) string {
	switch {
	case !s.Made():
		return ""
	case conf.Wrapping() != nil:
		return "made a new store, whose master key " + conf.Wrapping()[0].String() + " has wrapped"
	case conf.Database != "":
		return "made a new store in the database, and its master key is in " + conf.Dir
	}
	return "made a new store in " + conf.Dir + ", with its master key: keep a backup of both, apart"
}

// audited runs one operation and writes its line of the audit log.
func audited[T any](ctx context.Context, l *localKeys, action, kek string, do func(context.Context, *auditing.Entry) (T, error)) (T, error) {
	return auditedWithin(ctx, localTimeout, l, action, kek, do)
}

// auditedWithin is audited with another timeout.
func auditedWithin[T any](ctx context.Context, timeout time.Duration, l *localKeys, action, kek string, do func(context.Context, *auditing.Entry) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	e := newEntry(action, kek, "command line")
	e.Who = fmt.Sprintf("uid:%d", os.Getuid())
	e.Caller.Identity = e.Who
	answer, err := do(ctx, e)
	if err = l.api.write(ctx, e, err); err != nil {
		var none T
		return none, &StatusError{e.Status, problemOf(e, err).Detail}
	}
	return answer, nil
}

// onKEK is audited for an operation on a KEK.
func onKEK[T any](ctx context.Context, l *localKeys, action, id string, do func(context.Context, *auditing.Entry, keyring.KEK) (T, error), may ...policy.Action) (T, error) {
	return audited(ctx, l, action, id, func(ctx context.Context, e *auditing.Entry) (answer T, err error) {
		k, err := l.api.allowed(ctx, e, may...)
		if err != nil {
			return answer, err
		}
		return do(ctx, e, k)
	})
}

func (l *localKeys) Create(ctx context.Context, id string, key []byte) (keyring.Info, error) {
	action := "create"
	if key != nil {
		action = "import"
	}
	return audited(ctx, l, action, id, func(ctx context.Context, e *auditing.Entry) (keyring.Info, error) {
		return l.api.createKEK(ctx, e, key)
	})
}

func (l *localKeys) List(ctx context.Context) ([]keyring.Info, error) {
	return audited(ctx, l, "list", "", l.api.listKEKs)
}

func (l *localKeys) Get(ctx context.Context, id string) (keyring.Info, error) {
	return onKEK(ctx, l, "info", id, l.api.describe, policy.Actions...)
}

func (l *localKeys) Rotate(ctx context.Context, id string) (keyring.Info, error) {
	return onKEK(ctx, l, "rotate", id, l.api.rotateKEK, policy.Admin)
}

func (l *localKeys) Disable(ctx context.Context, id string, version int) (keyring.Info, error) {
	return onKEK(ctx, l, "disable", id, func(ctx context.Context, e *auditing.Entry, k keyring.KEK) (keyring.Info, error) {
		return l.api.changeVersion(ctx, e, k, version, l.api.keks.Store.Disable)
	}, policy.Admin)
}

func (l *localKeys) Enable(ctx context.Context, id string, version int) (keyring.Info, error) {
	return onKEK(ctx, l, "enable", id, func(ctx context.Context, e *auditing.Entry, k keyring.KEK) (keyring.Info, error) {
		return l.api.changeVersion(ctx, e, k, version, l.api.keks.Store.Enable)
	}, policy.Admin)
}

func (l *localKeys) Destroy(ctx context.Context, id string, version int, after time.Duration) (keyring.Info, error) {
	return onKEK(ctx, l, "destroy", id, func(ctx context.Context, e *auditing.Entry, k keyring.KEK) (keyring.Info, error) {
		return l.api.destroyVersion(ctx, e, k, version, seconds(after/time.Second))
	}, policy.Admin)
}

func (l *localKeys) Revoke(ctx context.Context, id, identity string) (keyring.Info, error) {
	return onKEK(ctx, l, "revoke", id, func(ctx context.Context, e *auditing.Entry, k keyring.KEK) (keyring.Info, error) {
		return l.api.changeIdentity(ctx, e, k, identity, l.api.keks.Store.Revoke)
	}, policy.Admin)
}

func (l *localKeys) Reinstate(ctx context.Context, id, identity string) (keyring.Info, error) {
	return onKEK(ctx, l, "reinstate", id, func(ctx context.Context, e *auditing.Entry, k keyring.KEK) (keyring.Info, error) {
		return l.api.changeIdentity(ctx, e, k, identity, l.api.keks.Store.Reinstate)
	}, policy.Admin)
}

func (l *localKeys) Check(ctx context.Context, id string) (Check, error) {
	return onKEK(ctx, l, "check", id, l.api.checkKEK, policy.Admin)
}

func (l *localKeys) Created() string { return l.created }

func (l *localKeys) Close() error { return l.api.close() }

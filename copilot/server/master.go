package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/server/auditing"
	"github.com/ctrlplane/pilot/copilot/server/keyring"
	"github.com/ctrlplane/pilot/internal/exit"
)

// masterPath is the admin socket's path for the master keys.
const masterPath = "/master"

const (
	// masterInterval is how often a copilot looks whether the master key is being rotated.
	masterInterval = 2 * time.Second
	// masterPatience is how long a copilot that shares its store leaves a rotation to the
	// one that began it.
	masterPatience = 10 * time.Second
	// holderPatience is how long the command line waits for other holders, which look
	// each masterInterval.
	holderPatience = 5 * time.Second
	// masterPause is how many times as long as it has worked a copilot then waits, so that
	// requests do not wait for the rotation.
	masterPause = 3
)

// masterRotation goes on with rotations of the master key while a server runs.
type masterRotation struct {
	begun  chan struct{} // gets one when this copilot begins one
	reason string        // why it did not go on, for the log
}

func (m *masterRotation) run(ctx context.Context, b *broker) {
	tick := time.NewTicker(masterInterval)
	defer tick.Stop()
	held := false
	var mine bool
	var since time.Time
	for {
		if !held {
			held = b.keks.Store.HoldMaster(ctx) == nil
		}
		status, err := b.keks.Store.RotationStatus(ctx)
		switch {
		case err != nil || !status.Rotating:
			mine, since = false, time.Time{}
		case since.IsZero():
			since = time.Now()
		}
		if err == nil && status.Rotating && (mine || status.Resealed || !b.keks.Store.Shared() || time.Since(since) > masterPatience) {
			done, err := b.keks.Store.ResealMaster(ctx, pause(ctx), b.masterRotated)
			if done && err == nil {
				logrus.WithField("version", status.Current).Info("master key rotated")
			}
			m.log(ctx, err)
		}
		select {
		case <-ctx.Done():
			return
		case <-m.begun:
			mine = true
		case <-tick.C:
		}
	}
}

// log logs a new reason why the rotation does not go on.
func (m *masterRotation) log(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return
	}
	reason := ""
	if err != nil {
		reason = err.Error()
	}
	if reason != m.reason && err != nil {
		logrus.WithError(err).Error("can't rotate the master key: retrying")
	}
	m.reason = reason
}

// pause waits between two parts of a rotation.
func pause(ctx context.Context) func(took time.Duration) {
	return func(took time.Duration) {
		select {
		case <-ctx.Done():
		case <-time.After(masterPause * took):
		}
	}
}

// masterRotated audits the end of a rotation, right before the old master key is dropped.
func (b *broker) masterRotated(version int) error {
	return b.audit.Write(audit.Entry{Action: "master-rotated", Version: version, Who: "copilot", From: "copilot", Verdict: audit.Allowed,
		Reason: fmt.Sprintf("nothing is sealed under master key %d any more: it is dropped", version-1)})
}

func (a *api) masterStatus(r *http.Request, _ *auditing.Entry) (any, error) {
	return a.keks.Store.MasterStatus(r.Context())
}

// rotationStatus handles requests for the progress of a rotation, which come often.
func (b *broker) rotationStatus(w http.ResponseWriter, r *http.Request) {
	if !b.opened.Load() {
		http.Error(w, b.notOpen().Error(), http.StatusServiceUnavailable)
		return
	}
	status, err := b.keks.Store.RotationStatus(r.Context())
	if err != nil {
		logrus.WithError(err).Error("can't read the progress of the master key's rotation")
		http.Error(w, "see copilot's log", http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(status)
}

func (a *api) rotateMaster(r *http.Request, e *auditing.Entry) (any, error) {
	if err := decodeOptional(r, &struct{}{}); err != nil {
		return nil, err
	}
	return a.beginRotation(r.Context(), e)
}

func (a *api) beginRotation(ctx context.Context, e *auditing.Entry) (keystore.MasterStatus, error) {
	if err := a.approved(ctx, e, opMasterRotate, "a new master key"); err != nil {
		return keystore.MasterStatus{}, err
	}
	_, err := a.keks.Store.RotateMaster(ctx, func(version int) error {
		e.Version = version
		return a.audit.WriteAhead(e)
	})
	if err != nil {
		return keystore.MasterStatus{}, err
	}
	select {
	case a.master.begun <- struct{}{}:
	default:
	}
	return a.keks.Store.RotationStatus(ctx)
}

type holderBody struct {
	Holder string `json:"holder"`
}

func (a *api) forgetHolder(r *http.Request, e *auditing.Entry) (any, error) {
	var in holderBody
	if err := decodeBody(r, &in); err != nil {
		return nil, err
	}
	return a.forget(r.Context(), e, in.Holder)
}

func (a *api) forget(ctx context.Context, e *auditing.Entry, holder string) (keystore.MasterStatus, error) {
	e.Subject = holder
	err := a.keks.Store.ForgetHolder(ctx, holder, func() error { return a.audit.WriteAhead(e) })
	if err != nil {
		return keystore.MasterStatus{}, err
	}
	return a.keks.Store.RotationStatus(ctx)
}

// onMaster opens the store of conf, and calls what is to be done by the copilot that runs,
// or here if none does. Errors that a copilot has decided are a [*StatusError].
func onMaster[T any](ctx context.Context, conf Config, remote func(*remoteKeys) (T, error), local func(*localKeys) (T, error)) (T, error) {
	keys, err := OpenExistingKeys(ctx, conf)
	if err != nil {
		var none T
		return none, err
	}
	defer keys.Close()
	switch k := keys.(type) {
	case *localKeys:
		return local(k)
	case *remoteKeys:
		return remote(k)
	}
	panic("unknown kind of Keys")
}

// MasterStatus reports where the master keys are, and what they seal.
func MasterStatus(ctx context.Context, conf Config) (keystore.MasterStatus, error) {
	return onMaster(ctx, conf, func(k *remoteKeys) (status keystore.MasterStatus, err error) {
		return status, k.get(ctx, masterPath, &status)
	}, func(k *localKeys) (keystore.MasterStatus, error) {
		return audited(ctx, k, "master-status", "", func(ctx context.Context, _ *auditing.Entry) (keystore.MasterStatus, error) {
			return k.api.keks.Store.MasterStatus(ctx)
		})
	})
}

// ForgetHolder forgets a holder of the master key, by its name.
func ForgetHolder(ctx context.Context, conf Config, holder string) (keystore.MasterStatus, error) {
	return onMaster(ctx, conf, func(k *remoteKeys) (status keystore.MasterStatus, err error) {
		body, err := json.Marshal(holderBody{holder})
		if err == nil {
			err = k.post(ctx, masterPath+"/forget", body, &status)
		}
		return status, err
	}, func(k *localKeys) (keystore.MasterStatus, error) {
		return audited(ctx, k, "master-forget", "", func(ctx context.Context, e *auditing.Entry) (keystore.MasterStatus, error) {
			return k.api.forget(ctx, e, holder)
		})
	})
}

// RotateMaster rotates the master key, and returns once that is done, or once it waits for
// other holders. If no copilot runs, it goes on with a rotation that was interrupted.
// begun is called once there is a new master key.
func RotateMaster(ctx context.Context, conf Config, begun func(keystore.MasterStatus)) (keystore.MasterStatus, error) {
	return onMaster(ctx, conf, func(k *remoteKeys) (status keystore.MasterStatus, err error) {
		if err := k.post(ctx, masterPath+"/rotate", nil, &status); err != nil {
			return status, err
		}
		begun(status)
		var waiting time.Time // since then
		for status.Rotating && (waiting.IsZero() || time.Since(waiting) < holderPatience) {
			if waiting.IsZero() && status.Resealed {
				waiting = time.Now()
			}
			select {
			case <-ctx.Done():
				return status, errors.New("stopped waiting: the rotation goes on, see \"copilot master status\"")
			case <-time.After(500 * time.Millisecond):
			}
			status = keystore.MasterStatus{}
			if err := k.get(ctx, masterPath+"/rotation", &status); err != nil {
				return status, err
			}
		}
		return status, nil
	}, func(k *localKeys) (status keystore.MasterStatus, err error) {
		store := k.api.keks.Store
		if status, err = store.RotationStatus(ctx); err != nil {
			return status, err
		}
		if !status.Rotating {
			status, err = audited(ctx, k, "master-rotate", "", k.api.beginRotation)
		}
		if err != nil {
			return status, err
		}
		begun(status)
		if _, err := store.ResealMaster(ctx, func(time.Duration) {}, k.api.masterRotated); err != nil {
			return status, fmt.Errorf("%w: \"copilot master rotate\" goes on from here", err)
		}
		return store.RotationStatus(ctx)
	})
}

// get sends a request to a path of the admin socket.
func (k *remoteKeys) get(ctx context.Context, path string, out any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, k.base+path, nil)
	if err != nil {
		return err
	}
	return k.do(req, out)
}

// MoveMaster moves the master key to the KMS that conf names, or, if toFile is set, from
// there to a file. Nothing else may have the store open.
func MoveMaster(ctx context.Context, conf Config, toFile bool) (moved keystore.Moved, err error) {
	if err := conf.check(); err != nil {
		return moved, exit.UsageError(err)
	}
	var to *keystore.Wrapping
	switch wrapping := conf.Wrapping(); {
	case toFile:
	case wrapping == nil:
		return moved, errors.New("copilot.toml has no [master-key]: name a backend that wraps, and a path there")
	default:
		to = &wrapping[0]
	}
	move, err := keystore.OpenMove(ctx, conf.Dir, conf.Database, to, func(name string) (func() (kms.Backend, error), bool) {
		return conf.openBackend(name)
	})
	if err != nil {
		return moved, err
	}
	defer move.Close()
	log, err := openAudit(ctx, conf, move.Store)
	if err != nil {
		return moved, err
	}
	defer log.Close()
	b := &broker{audit: auditing.New(), metrics: newMetrics(), keks: &keyring.Keyring{Store: move.Store}}
	b.audit.Open(log)
	heads := &headNotes{log: log, store: move.Store, name: conf.AuditName()}
	defer heads.note(context.WithoutCancel(ctx))
	return audited(ctx, &localKeys{api: &api{broker: b, owner: true}}, "master-move", "", func(ctx context.Context, e *auditing.Entry) (keystore.Moved, error) {
		e.Reason = fmt.Sprintf("from %s to %s", move.From(), move.To())
		if err := b.audit.WriteAhead(e); err != nil {
			return keystore.Moved{}, err
		}
		return move.Run(ctx)
	})
}

// MakeStore makes the store of conf unless it exists, and checks that it opens.
func MakeStore(ctx context.Context, conf Config) error {
	if err := conf.check(); err != nil {
		return exit.UsageError(err)
	}
	store, err := keystore.Open(ctx, conf.Dir, conf.Database, conf.Wrapping()...)
	if err != nil {
		return err
	}
	return store.Close()
}

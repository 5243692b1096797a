package server

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/server/auditing"
)

// checkInterval is how often records that have changed are compared with their anchors, and
// keys are destroyed whose time has come. Each record is compared when it is used, too.
const checkInterval = time.Minute

// RolledBack is what was put back in the store as it was earlier, or deleted.
type RolledBack struct {
	Name   string `json:"name"` // "kek ID", "store", or another record's
	Reason string `json:"reason"`
}

func rolledBackOf(found map[string]string) []RolledBack {
	list := []RolledBack{}
	for _, name := range slices.Sorted(maps.Keys(found)) {
		list = append(list, RolledBack{name, found[name]})
	}
	return list
}

// checkAnchors looks for records that were put back, and reports those that are new.
func (b *broker) checkAnchors(ctx context.Context) error {
	found, err := b.keks.Store.CheckChanged(ctx, b.least)
	if err != nil {
		return err
	}
	b.metrics.rolledBack.Set(float64(len(found)))
	for _, r := range rolledBackOf(found) {
		if b.rolledBack[r.Name] != r.Reason {
			logrus.WithFields(logrus.Fields{"record": r.Name, "reason": r.Reason}).Error("A RECORD WAS PUT BACK IN THE DATABASE as it was earlier, or deleted: it is refused until \"copilot store acknowledge\"")
		}
	}
	b.rolledBack = found
	return nil
}

// countChanges writes a line if the last one does not have the store's generation yet: a
// line that is written before a change can't have it.
func (b *broker) countChanges() {
	if b.auditLog.Counted() >= b.keks.Store.Generation() {
		return
	}
	err := b.audit.Write(audit.Entry{Action: "anchor", Who: "copilot", From: "copilot", Verdict: audit.Allowed, Reason: "the store was changed"})
	if err != nil {
		logrus.WithError(err).Warn("can't write down that the store was changed")
	}
}

// The admin socket's paths for records that were put back.
const (
	checkStorePath = "/store/check"
	acceptPath     = "/store/acknowledge"
)

// CheckStore returns what was put back, in the database of the store that conf names, as it
// was earlier: through the broker that runs there if one does.
func CheckStore(ctx context.Context, conf Config) ([]RolledBack, error) {
	return rollbacks(ctx, conf, "check", checkStorePath, nil, (*api).rolledBackNow)
}

// AcknowledgeRollback takes those records as they are. It is audited with who says so, and
// why.
func AcknowledgeRollback(ctx context.Context, conf Config, ack Acknowledgement) ([]RolledBack, error) {
	return rollbacks(ctx, conf, "acknowledge", acceptPath, ack, func(a *api, ctx context.Context, e *auditing.Entry) ([]RolledBack, error) {
		return a.accept(ctx, e, ack)
	})
}

func rollbacks(ctx context.Context, conf Config, action, path string, in any, do func(*api, context.Context, *auditing.Entry) ([]RolledBack, error)) (list []RolledBack, err error) {
	keys, err := OpenExistingKeys(ctx, conf)
	if err != nil {
		return nil, err
	}
	defer keys.Close()
	switch k := keys.(type) {
	case *localKeys:
		return audited(ctx, k, action, "", func(ctx context.Context, e *auditing.Entry) ([]RolledBack, error) { return do(k.api, ctx, e) })
	case *remoteKeys:
		var body []byte
		if in != nil {
			if body, err = json.Marshal(in); err != nil {
				return nil, err
			}
		}
		err = k.post(ctx, path, bytes.Clone(body), &list)
		return list, err
	}
	panic("unknown kind of Keys")
}

func (a *api) checkStore(r *http.Request, e *auditing.Entry) (any, error) {
	return a.rolledBackNow(r.Context(), e)
}

func (a *api) rolledBackNow(ctx context.Context, e *auditing.Entry) ([]RolledBack, error) {
	found, err := a.keks.Store.CheckAnchors(ctx, a.least)
	e.Reason = fmt.Sprintf("%d records were put back or deleted", len(found))
	return rolledBackOf(found), err
}

func (a *api) acceptRollback(r *http.Request, e *auditing.Entry) (any, error) {
	var in Acknowledgement
	if err := decodeBody(r, &in); err != nil {
		return nil, err
	}
	return a.accept(r.Context(), e, in)
}

func (a *api) accept(ctx context.Context, e *auditing.Entry, ack Acknowledgement) ([]RolledBack, error) {
	if err := ack.check(); err != nil {
		return nil, err
	}
	e.Reason = "no record was put back"
	found, err := a.keks.Store.AcceptRollback(ctx, a.least, func(found map[string]string) error {
		names := slices.Sorted(maps.Keys(found))
		most := min(len(names), 8)
		e.Reason = fmt.Sprintf("%d records that were put back or deleted, by %s: %s: %s", len(names), ack.By, ack.Reason, strings.Join(names[:most], ", "))
		return a.audit.WriteAhead(e)
	})
	if err != nil {
		return nil, err
	}
	logrus.WithFields(logrus.Fields{"records": len(found), "by": ack.By, "reason": ack.Reason}).Warn("records that were put back were acknowledged")
	return rolledBackOf(found), nil
}

package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/server/auditing"
)

// noteInterval is how often a new last line of the audit log is recorded in the store.
// Lines that are younger than this when copilot is killed can be cut off unnoticed.
const noteInterval = time.Second

// AuditName returns the audit log's name in the store.
func (c Config) AuditName() string {
	if to := c.AuditTo(); to == auditDatabase || to == "-" {
		return to
	}
	return keystore.AuditLogName(c.AuditTo(), c.Database != "")
}

// headNotes records the last line of the audit log in the store, after it is on disk: a
// crash in between leaves an older line there, after which the log continues.
type headNotes struct {
	log   *audit.Log
	store *keystore.Store
	name  string

	mu     sync.Mutex
	noted  audit.Head
	failed bool
}

// note records the last line if it is new.
func (n *headNotes) note(ctx context.Context) {
	n.mu.Lock()
	defer n.mu.Unlock()
	h := n.log.Head()
	if h == n.noted || h.Seq == 0 {
		return
	}
	err := n.store.NoteAuditHead(ctx, keystore.AuditHead{Chain: h.Chain, Seq: h.Seq, MAC: h.MAC, Log: n.name, At: time.Now().UTC()})
	if err != nil && !n.failed {
		logrus.WithError(err).Warn("can't record the audit log's last line in the store: retrying")
	}
	if n.failed = err != nil; n.failed {
		return
	}
	if ended := n.log.Ended(); n.noted.Seq == 0 && ended.Seq > 0 {
		// The log itself names that line now, so it need not be looked for.
		err := n.store.NoteAuditHead(ctx, keystore.AuditHead{Chain: ended.Chain, Seq: ended.Seq, MAC: ended.MAC, Log: n.name, At: time.Now().UTC(), Lost: true})
		if err != nil {
			return
		}
	}
	n.noted = h
}

// run records the last line each noteInterval, until ctx is done.
func (n *headNotes) run(ctx context.Context) {
	tick := time.NewTicker(noteInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			n.note(ctx)
		}
	}
}

// openAudit opens the audit log of a configuration, and checks that it has the lines that
// the store has recorded.
func openAudit(ctx context.Context, conf Config, store *keystore.Store) (*audit.Log, error) {
	key := audit.Key(store.AuditKey())
	heads, err := store.AuditHeads(ctx)
	if err != nil {
		return nil, err
	}
	known := HeadsOf(heads, conf.AuditName())
	if to := conf.AuditTo(); to != auditDatabase {
		return audit.OpenFile(to, key, known...)
	}
	return audit.OpenPostgres(ctx, conf.Database, key, known...)
}

// HeadsOf returns the heads that a log has to have, the last one at the end.
func HeadsOf(heads []keystore.AuditHead, log string) []audit.Head {
	slices.SortFunc(heads, func(a, b keystore.AuditHead) int { return a.At.Compare(b.At) })
	var list []audit.Head
	for _, h := range heads {
		if h.Log == log && !h.Lost {
			list = append(list, headOf(h))
		}
	}
	return list
}

// AcknowledgedOf returns the heads of a log that need not be there any more, and says of
// each who has acknowledged that, and why.
func AcknowledgedOf(heads []keystore.AuditHead, log string) (list []audit.Head, why []string) {
	for _, h := range heads {
		if h.Log == log && h.Acknowledged != "" {
			list, why = append(list, headOf(h)), append(why, h.Acknowledged)
		}
	}
	return list, why
}

func headOf(h keystore.AuditHead) audit.Head {
	return audit.Head{Chain: h.Chain, Seq: h.Seq, MAC: h.MAC}
}

// auditHeadsPath is the admin socket's path for the heads, since nothing else can open the
// store while it is in use.
const auditHeadsPath = "/audit/heads"

// auditHeads handles requests for the heads in the store.
func (b *broker) auditHeads(w http.ResponseWriter, r *http.Request) {
	if !b.opened.Load() {
		http.Error(w, b.notOpen().Error(), http.StatusServiceUnavailable)
		return
	}
	b.heads.note(r.Context())
	heads, err := b.keks.Store.AuditHeads(r.Context())
	if errors.Is(err, keystore.ErrAuditHead) {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	if err != nil {
		logrus.WithError(err).Error("can't read the heads of the audit log")
		http.Error(w, "see copilot's log", http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(heads)
}

// AuditHeads returns the last lines of audit logs that the store has recorded: from the
// copilot that has it open, or from the store itself. The error wraps
// [keystore.ErrAuditHead] if a record was changed.
func AuditHeads(ctx context.Context, conf Config) ([]keystore.AuditHead, error) {
	admin := adminOf(conf.Dir)
	defer admin.Close()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, admin.base+auditHeadsPath, nil)
	if err != nil {
		return nil, err
	}
	resp, err := admin.http.Do(r)
	if err != nil { // none runs
		store, err := keystore.Read(ctx, conf.Dir, conf.Database, conf.Wrapping()...)
		if err != nil {
			return nil, err
		}
		defer store.Close()
		return store.AuditHeads(ctx)
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusInternalServerError:
		return nil, fmt.Errorf("a recorded line of the audit log was %w", keystore.ErrAuditHead)
	default:
		return nil, fmt.Errorf("the running copilot answered %s", resp.Status)
	}
	var heads []keystore.AuditHead
	err = json.NewDecoder(io.LimitReader(resp.Body, 64<<20)).Decode(&heads)
	return heads, err
}

// auditKeyPath is the admin socket's path for the audit log's key, since nothing else can
// open a store that is a file while it is in use.
const auditKeyPath = "/audit/key"

// auditKey returns the audit log's key, to those who can read the store.
func (a *api) auditKey(*http.Request, *auditing.Entry) (any, error) {
	return raw(a.keks.Store.AuditKey()), nil
}

// AuditKey returns the key that authenticates the audit log: from the master key's file, or
// if a KMS has wrapped that, from the copilot that runs, or from the store itself.
func AuditKey(ctx context.Context, conf Config) (audit.Key, error) {
	wrapping := conf.Wrapping()
	if wrapping == nil {
		return keystore.AuditKey(conf.Dir)
	}
	admin := adminOf(conf.Dir)
	defer admin.Close()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, admin.base+auditKeyPath, nil)
	if err != nil {
		return nil, err
	}
	resp, err := admin.http.Do(r)
	if err != nil { // none runs
		store, err := keystore.Read(ctx, conf.Dir, conf.Database, wrapping...)
		if err != nil {
			return nil, err
		}
		defer store.Close()
		return store.AuditKey(), nil
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the running copilot answered %s", resp.Status)
	}
	return io.ReadAll(io.LimitReader(resp.Body, 1<<10))
}

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
)

// noteInterval is how often the last line of the audit log is noted in the store, if
// there is a new one. What is cut off of a log right after copilot was killed, and is
// not older than this, is not found.
const noteInterval = time.Second

// AuditName returns what the store calls the audit log.
func (c Config) AuditName() string {
	if to := c.AuditTo(); to == auditDatabase || to == "-" {
		return to
	}
	return keystore.AuditLogName(c.AuditTo(), c.Database != "")
}

// headNotes notes the last line of the audit log in the store, after it is on disk:
// a crash in between leaves an older one there, which the log goes on from.
type headNotes struct {
	log   *audit.Log
	store *keystore.Store
	name  string

	mu     sync.Mutex
	noted  audit.Head
	failed bool
}

// note notes the last line, if that is new.
func (n *headNotes) note(ctx context.Context) {
	n.mu.Lock()
	defer n.mu.Unlock()
	h := n.log.Head()
	if h == n.noted || h.Seq == 0 {
		return
	}
	err := n.store.NoteAuditHead(ctx, keystore.AuditHead{Chain: h.Chain, Seq: h.Seq, MAC: h.MAC, Log: n.name, At: time.Now().UTC()})
	if err != nil && !n.failed {
		logrus.WithError(err).Warn("the audit log's last line is not noted in the store: it is tried again")
	}
	if n.failed = err != nil; n.failed {
		return
	}
	if ended := n.log.Ended(); n.noted.Seq == 0 && ended.Seq > 0 {
		// What is in the log names that line now: nothing is looked for by the store.
		err := n.store.NoteAuditHead(ctx, keystore.AuditHead{Chain: ended.Chain, Seq: ended.Seq, MAC: ended.MAC, At: time.Now().UTC()})
		if err != nil {
			return
		}
	}
	n.noted = h
}

// run notes the last line now and then, until ctx is done.
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

// openAudit opens the audit log of a configuration, and looks for the lines that the
// store knows of.
func openAudit(ctx context.Context, conf Config, store *keystore.Store) (*audit.Log, error) {
	key, err := keystore.AuditKey(conf.Dir)
	if err != nil {
		return nil, err
	}
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

// HeadsOf returns the heads of one log, the last one at the end.
func HeadsOf(heads []keystore.AuditHead, log string) []audit.Head {
	slices.SortFunc(heads, func(a, b keystore.AuditHead) int { return a.At.Compare(b.At) })
	var list []audit.Head
	for _, h := range heads {
		if h.Log == log {
			list = append(list, audit.Head{Chain: h.Chain, Seq: h.Seq, MAC: h.MAC})
		}
	}
	return list
}

// auditHeadsPath is where the admin socket has the heads, for who can't open the
// store while it is in use.
const auditHeadsPath = "/audit/heads"

// auditHeads answers with the heads in the store.
func (b *broker) auditHeads(w http.ResponseWriter, r *http.Request) {
	if !b.opened.Load() {
		http.Error(w, "copilot's database can't be used", http.StatusServiceUnavailable)
		return
	}
	b.heads.note(r.Context())
	heads, err := b.keks.Store.AuditHeads(r.Context())
	if errors.Is(err, keystore.ErrAuditHead) {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	if err != nil {
		logrus.WithError(err).Error("heads of the audit log not read")
		http.Error(w, "see copilot's log", http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(heads)
}

// AuditHeads returns what the store notes of audit logs: from the copilot that runs
// with it, or from the store. The error wraps [keystore.ErrAuditHead] if that was
// changed there.
func AuditHeads(ctx context.Context, conf Config) ([]keystore.AuditHead, error) {
	admin := adminOf(conf.Dir)
	defer admin.Close()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, admin.base+auditHeadsPath, nil)
	if err != nil {
		return nil, err
	}
	resp, err := admin.http.Do(r)
	if err != nil { // none runs
		return keystore.ReadAuditHeads(ctx, conf.Dir, conf.Database)
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusInternalServerError:
		return nil, fmt.Errorf("a last line of the audit log was %w", keystore.ErrAuditHead)
	default:
		return nil, fmt.Errorf("the running copilot answered %s", resp.Status)
	}
	var heads []keystore.AuditHead
	err = json.NewDecoder(io.LimitReader(resp.Body, 64<<20)).Decode(&heads)
	return heads, err
}

package server

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/server/auditing"
)

// Acknowledgement says that lines which the audit log lacks need not be there.
type Acknowledgement struct {
	By     string `json:"by"`     // who says so
	Reason string `json:"reason"` // why they are gone
}

// maxAcknowledgement bounds each field, in bytes, so that both fit into a line of the
// audit log.
const maxAcknowledgement = 150

func (a Acknowledgement) check() error {
	for name, value := range map[string]string{"who acknowledges it": a.By, "the reason": a.Reason} {
		if strings.TrimSpace(value) == "" {
			return fmt.Errorf("%w: %s is missing", keystore.ErrInput, name)
		}
		if len(value) > maxAcknowledgement {
			return fmt.Errorf("%w: %s has more than %d bytes", keystore.ErrInput, name, maxAcknowledgement)
		}
	}
	return nil
}

// acknowledgePath is the admin socket's path for acknowledgements.
const acknowledgePath = "/audit/acknowledge"

// AcknowledgeAudit acknowledges that the audit log of conf lacks the last lines of some
// chains, which it returns: their rows or files were deleted on purpose. From then on
// copilot does not look for them at its start, and [audit.VerifyTo] takes them for
// acknowledged. It goes through the broker that runs, if one does, and is audited. Errors
// that the broker has decided are a [*StatusError].
func AcknowledgeAudit(ctx context.Context, conf Config, a Acknowledgement) ([]audit.Head, error) {
	keys, err := OpenExistingKeys(ctx, conf)
	if err != nil {
		return nil, err
	}
	defer keys.Close()
	switch k := keys.(type) {
	case *localKeys:
		return audited(ctx, k, "acknowledge", "", func(ctx context.Context, e *auditing.Entry) ([]audit.Head, error) {
			return k.api.acknowledgeMissing(ctx, e, a)
		})
	case *remoteKeys:
		body, err := json.Marshal(a)
		if err != nil {
			return nil, err
		}
		var heads []audit.Head
		err = k.post(ctx, acknowledgePath, body, &heads)
		return heads, err
	}
	panic("unknown kind of Keys")
}

func (a *api) acknowledge(r *http.Request, e *auditing.Entry) (any, error) {
	var in Acknowledgement
	if err := decodeBody(r, &in); err != nil {
		return nil, err
	}
	return a.acknowledgeMissing(r.Context(), e, in)
}

// acknowledgeMissing looks for the lines that the store has recorded, and marks those that
// the log lacks. Others that are missing later are reported again.
func (a *api) acknowledgeMissing(ctx context.Context, e *auditing.Entry, ack Acknowledgement) ([]audit.Head, error) {
	if err := ack.check(); err != nil {
		return nil, err
	}
	a.heads.note(ctx)
	recorded, err := a.keks.Store.AuditHeads(ctx)
	if err != nil {
		return nil, err
	}
	var known []audit.Head
	for _, h := range recorded {
		if h.Log == a.heads.name && h.Acknowledged == "" {
			known = append(known, headOf(h))
		}
	}
	missing, err := a.auditLog.Missing(ctx, known)
	if err != nil {
		return nil, err
	}
	if len(missing) == 0 {
		e.Reason = "no lines are missing"
		return []audit.Head{}, nil
	}
	e.Reason = fmt.Sprintf("%d chains without their last lines, by %s: %s: %s", len(missing), ack.By, ack.Reason, chainsOf(missing))
	if err := a.audit.WriteAhead(e); err != nil {
		return nil, err
	}
	a.heads.note(ctx) // which may mark one of them as lost
	now := time.Now().UTC()
	for _, h := range missing {
		err := a.keks.Store.NoteAuditHead(ctx, keystore.AuditHead{
			Chain: h.Chain, Seq: h.Seq, MAC: h.MAC, Log: a.heads.name, At: now, Lost: true,
			Acknowledged: fmt.Sprintf("by %s: %s", ack.By, ack.Reason),
		})
		if err != nil {
			return nil, err
		}
	}
	logrus.WithFields(logrus.Fields{"chains": len(missing), "by": ack.By, "reason": ack.Reason}).Warn("lines that the audit log lacks were acknowledged")
	return missing, nil
}

// chainsOf names the first of the chains.
func chainsOf(heads []audit.Head) string {
	const most = 8
	var names []string
	for _, h := range heads[:min(len(heads), most)] {
		names = append(names, h.Chain)
	}
	if n := len(heads) - most; n > 0 {
		names = append(names, fmt.Sprintf("and %d more", n))
	}
	return strings.Join(names, ", ")
}

// post sends a request to a path of the admin socket that is not below that of the KEKs.
func (k *remoteKeys) post(ctx context.Context, path string, body []byte, out any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, k.base+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	return k.do(req, out)
}

package server

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/policy"
	"github.com/ctrlplane/pilot/copilot/server/auditing"
	"github.com/ctrlplane/pilot/copilot/server/authorization"
	"github.com/ctrlplane/pilot/copilot/server/caller"
)

// Approvals are which operations need a second admin.
type Approvals struct {
	// Require are some of [Operations].
	Require []string `toml:"require"`
	// ValidFor is how long a request can be approved and run. Default: 24h.
	ValidFor string `toml:"valid-for"`
}

// Operations that can need a second admin.
const (
	opDestroy      = "destroy"
	opExport       = "export" // of a KEK, or a backup, outside of the policy and the configuration
	opRestore      = "restore"
	opMasterRotate = "master-rotate"
)

// operations are all of them.
var operations = []string{opDestroy, opExport, opRestore, opMasterRotate}

const (
	defaultValidFor = 24 * time.Hour
	maxValidFor     = 30 * 24 * time.Hour
	// maxApprovals bounds the open requests of one admin.
	maxApprovals = 100
	// keepApprovals is how long requests that have expired are kept, so that an admin who is
	// late learns why.
	keepApprovals = 24 * time.Hour
)

// wholeStore are no KEKs' names. An admin of both is one of all KEKs: their depths are the
// least and the most that a name can have, so rules such as */* do not match them.
var wholeStore = []string{"*", strings.Repeat("*/", 63) + "*"}

func (a Approvals) check() error {
	for _, op := range a.Require {
		if !slices.Contains(operations, op) {
			return fmt.Errorf("approvals.require: unknown operation %q: it is one of %s", op, strings.Join(operations, ", "))
		}
	}
	if d, err := a.validFor(); err != nil || d < time.Second || d > maxValidFor {
		return fmt.Errorf("approvals.valid-for %q is not from 1s to 720h", a.ValidFor)
	}
	return nil
}

func (a Approvals) validFor() (time.Duration, error) {
	if a.ValidFor == "" {
		return defaultValidFor, nil
	}
	return time.ParseDuration(a.ValidFor)
}

// needsApproval is the error of an operation that waits for a second admin.
type needsApproval struct{ keystore.Approval }

func (n *needsApproval) Error() string {
	return fmt.Sprintf("%s needs a second admin: have another one run \"copilot approvals approve %s\" before %s, then run this again", n.Operation, n.ID, n.Expires.Format(time.RFC3339))
}

// approved returns nil if an operation needs no second admin, or has one: an approved
// request of this caller for the same content, which it uses up. Otherwise it makes a
// request, unless there is one, and returns a [*needsApproval].
func (a *api) approved(ctx context.Context, e *auditing.Entry, operation, content string) error {
	if !slices.Contains(a.conf.Approvals.Require, operation) {
		return nil
	}
	list, err := a.keks.Store.Approvals(ctx)
	if err != nil && !errors.Is(err, keystore.ErrRolledBack) {
		return err // one that was put back does not count, and others do
	}
	same := func(r keystore.Approval) bool {
		return r.Operation == operation && r.KEK == e.KEK && r.Content == content && r.By == e.Who && r.Open(time.Now())
	}
	open := 0
	var waiting *keystore.Approval
	for _, r := range list {
		if r.By == e.Who && r.Open(time.Now()) {
			open++
		}
		if !same(r) {
			continue
		}
		if r.Approved == "" {
			waiting = &r
			continue
		}
		_, err := a.keks.Store.ChangeApproval(ctx, r.ID, func(now *keystore.Approval, _ bool) error {
			if !same(*now) || now.Approved == "" {
				return fmt.Errorf("%w: request %s was used already", keystore.ErrState, r.ID)
			}
			now.Used = time.Now().UTC()
			return nil
		})
		if err != nil {
			return err
		}
		e.Approval = fmt.Sprintf("%s, approved by %s", r.ID, r.Approved)
		return nil
	}
	if waiting != nil {
		return &needsApproval{*waiting}
	}
	if open >= maxApprovals {
		return fmt.Errorf("%w: %s has %d open requests already", keystore.ErrState, e.Who, open)
	}
	validFor, err := a.conf.Approvals.validFor()
	if err != nil {
		return err
	}
	if err := a.keks.Store.DropApprovals(ctx, time.Now().Add(-keepApprovals)); err != nil {
		return err
	}
	id := strings.ToLower(rand.Text()[:12])
	now := time.Now().UTC().Truncate(time.Second)
	made, err := a.keks.Store.ChangeApproval(ctx, id, func(r *keystore.Approval, isNew bool) error {
		if !isNew {
			return fmt.Errorf("%w: there is a request %s already", keystore.ErrState, id)
		}
		r.Operation, r.KEK, r.Content, r.By, r.At, r.Expires = operation, e.KEK, content, e.Who, now, now.Add(validFor)
		owner := a.isOwner(e)
		r.Owner = &owner
		return a.audit.Write(audit.Entry{Request: e.Request, Action: "approval-request", KEK: e.KEK, Who: e.Who, From: e.From, Verdict: audit.Allowed,
			Approval: id, Reason: operation + ": " + content})
	})
	if err != nil {
		return err
	}
	return &needsApproval{made}
}

// outsidePolicy reports whether a caller gets a KEK only since it owns the store.
func (a *api) outsidePolicy(e *auditing.Entry) bool {
	return a.owner && authorization.ByPolicy(a.policy.Policy(), e.Caller).May(e.KEK, policy.Export) != nil
}

// mayApprove reports whether the policy has the caller as an admin of what a request is
// about.
func (a *api) mayApprove(e *auditing.Entry, r keystore.Approval) bool {
	of := wholeStore
	if r.KEK != "" {
		of = []string{r.KEK}
	}
	return !slices.ContainsFunc(of, func(kek string) bool { return a.rights(e).May(kek, policy.Admin) != nil })
}

func (a *api) approvals(r *http.Request, e *auditing.Entry) (any, error) {
	return a.listApprovals(r.Context(), e)
}

// listApprovals returns the requests that are open, and that the caller may approve, the
// oldest first.
func (a *api) listApprovals(ctx context.Context, e *auditing.Entry) ([]keystore.Approval, error) {
	all, err := a.keks.Store.Approvals(ctx)
	if err != nil {
		logrus.WithError(err).Error("requests for approval are missing from the list")
		if !errors.Is(err, keystore.ErrRolledBack) {
			return nil, err
		}
	}
	list := slices.DeleteFunc(append([]keystore.Approval{}, all...), func(r keystore.Approval) bool {
		return !r.Open(time.Now()) || !a.mayApprove(e, r)
	})
	slices.SortFunc(list, func(a, b keystore.Approval) int { return cmp.Or(a.At.Compare(b.At), cmp.Compare(a.ID, b.ID)) })
	return list, nil
}

func (a *api) approve(r *http.Request, e *auditing.Entry) (any, error) {
	if err := decodeOptional(r, &struct{}{}); err != nil {
		return nil, err
	}
	id := e.KEK // of the path
	e.KEK = ""
	return a.approveRequest(r.Context(), e, id)
}

// approveRequest approves a request of another admin.
func (a *api) approveRequest(ctx context.Context, e *auditing.Entry, id string) (keystore.Approval, error) {
	none := fmt.Errorf("%w: no such request: see \"copilot approvals list\"", keystore.ErrNotFound)
	all, err := a.keks.Store.Approvals(ctx)
	if err != nil && !errors.Is(err, keystore.ErrRolledBack) {
		return keystore.Approval{}, err
	}
	i := slices.IndexFunc(all, func(r keystore.Approval) bool { return r.ID == id })
	if i < 0 || !a.mayApprove(e, all[i]) {
		return keystore.Approval{}, none
	}
	if kek := all[i].KEK; kek != "" {
		k, err := a.keks.Find(ctx, kek)
		if err == nil {
			err = a.rights(e).NotRevoked(k.KEK)
		}
		if err != nil {
			return keystore.Approval{}, err
		}
	}
	return a.keks.Store.ChangeApproval(ctx, id, func(r *keystore.Approval, isNew bool) error {
		if isNew {
			return none
		}
		e.KEK, e.Approval = r.KEK, r.ID
		switch {
		case !r.Open(time.Now()):
			return fmt.Errorf("%w: request %s has expired, or was used: have it made again", keystore.ErrState, id)
		case isSame(r.By, e.Who):
			return fmt.Errorf("%w: %s has made request %s, and somebody else has to approve it", keystore.ErrState, e.Who, id)
		case a.isOwner(e) && mayBeOwners(*r):
			return fmt.Errorf("%w: request %s, by %s, counts as one of the store's owner, and so do you: somebody else has to approve it", keystore.ErrState, id, r.By)
		case r.Approved != "":
			return fmt.Errorf("%w: %s has approved request %s already", keystore.ErrState, r.Approved, id)
		}
		e.Reason = fmt.Sprintf("%s by %s: %s", r.Operation, r.By, r.Content)
		r.Approved, r.ApprovedAt = e.Who, time.Now().UTC().Truncate(time.Second)
		return a.audit.WriteAhead(e)
	})
}

// isSame reports whether two identities are one. A service account is the same on all nodes.
func isSame(a, b string) bool {
	return cmp.Or(policy.Group(a), a) == cmp.Or(policy.Group(b), b)
}

// isOwner reports whether a caller is one of those that can get at the store itself: on the
// admin socket or without a broker, whatever user they run as, and root and copilot's user on
// other sockets. Nobody knows who is anonymous.
func (a *api) isOwner(e *auditing.Entry) bool {
	return a.owner || slices.Contains([]string{"uid:0", fmt.Sprintf("uid:%d", os.Getuid()), caller.Anonymous}, e.Who)
}

// mayBeOwners reports whether a request may be one of those. Those of earlier versions may
// unless they have a certificate's identity, which the admin socket never had.
func mayBeOwners(r keystore.Approval) bool {
	if r.Owner != nil {
		return *r.Owner
	}
	kind, _, _ := strings.Cut(r.By, ":")
	return !slices.Contains([]string{"spiffe", "dns", "cn"}, kind)
}

const approvalsPath = "/api/v2/approvals"

func (k *remoteKeys) Approvals(ctx context.Context) (list []keystore.Approval, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, k.base+approvalsPath, nil)
	if err != nil {
		return nil, err
	}
	err = k.do(req, &list)
	return list, err
}

func (k *remoteKeys) Approve(ctx context.Context, id string) (r keystore.Approval, err error) {
	err = k.post(ctx, approvalsPath+"/"+url.PathEscape(id)+"/approve", nil, &r)
	return r, err
}

func (l *localKeys) Approvals(ctx context.Context) ([]keystore.Approval, error) {
	return audited(ctx, l, "approvals", "", l.api.listApprovals)
}

func (l *localKeys) Approve(ctx context.Context, id string) (keystore.Approval, error) {
	return audited(ctx, l, "approve", "", func(ctx context.Context, e *auditing.Entry) (keystore.Approval, error) {
		return l.api.approveRequest(ctx, e, id)
	})
}

package server

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/policy"
	"github.com/ctrlplane/pilot/copilot/server/auditing"
	"github.com/ctrlplane/pilot/copilot/server/keyring"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// Handlers for admins. Each decodes the request, and has a function that does the work,
// which the command line calls too: see local.go.

type newKEK struct {
	ID  string  `json:"id"`
	Key *[]byte `json:"key,omitempty"` // to import; absent: a new random one
}

func (a *api) create(r *http.Request, e *auditing.Entry) (any, error) {
	var in newKEK
	// The id, which authorization needs, is in the body.
	err := decodeSecret(r.Body, &in, "id", "key")
	var key []byte
	if in.Key != nil {
		e.Action, key = "import", *in.Key
		defer clear(key)
	}
	if err != nil {
		return nil, err
	}
	e.KEK = in.ID
	return a.createKEK(r.Context(), e, key)
}

// createKEK creates a KEK with a key, or with a random one if key is nil.
func (a *api) createKEK(ctx context.Context, e *auditing.Entry, key []byte) (keyring.Info, error) {
	if err := a.rights(e).May(e.KEK, policy.Admin); err != nil {
		return keyring.Info{}, err
	}
	if wireformat.IsAgeRecipient(e.KEK) {
		return keyring.Info{}, fmt.Errorf("%w: names that begin with age1 are recipients of age: use another one", keystore.ErrInput)
	}
	if location, ok := a.keks.Location(e.KEK); ok {
		return keyring.Info{}, fmt.Errorf("%w: the configuration says that it is in %s: create it there", keystore.ErrExists, location.Backend)
	}
	k, err := a.keks.Store.Create(ctx, e.KEK, key, keystore.Change{Log: a.keks.BeforeVersion(e)})
	return a.changed(ctx, keyring.KEK{KEK: k}, err)
}

// changed describes a KEK after a change that may have failed.
func (a *api) changed(ctx context.Context, k keyring.KEK, err error) (keyring.Info, error) {
	if err != nil {
		return keyring.Info{}, err
	}
	// The change is made, even if the number of wraps can't be read.
	info, err := a.keks.Describe(ctx, k)
	if err != nil {
		logrus.WithError(err).WithField("kek", k.ID).Warn("KEK changed, and its number of wraps is unknown")
	}
	return info, nil
}

func (a *api) rotate(r *http.Request, e *auditing.Entry, k keyring.KEK) (any, error) {
	if err := decodeOptional(r, &struct{}{}); err != nil {
		return nil, err
	}
	return a.rotateKEK(r.Context(), e, k)
}

func (a *api) rotateKEK(ctx context.Context, e *auditing.Entry, k keyring.KEK) (keyring.Info, error) {
	k, err := a.keks.Rotate(ctx, k, 0, e)
	if err != nil {
		return keyring.Info{}, err
	}
	info, err := a.changed(ctx, k, nil)
	info.Version = e.Version // which the KEK lacks if it is in a KMS
	return info, err
}

// versionBody is a request about a version, or about all if it is absent.
type versionBody struct {
	Version int `json:"version,omitempty"`
}

func (a *api) disable(r *http.Request, e *auditing.Entry, k keyring.KEK) (any, error) {
	var in versionBody
	if err := decodeOptional(r, &in); err != nil {
		return nil, err
	}
	return a.changeVersion(r.Context(), e, k, in.Version, a.keks.Store.Disable)
}

func (a *api) enable(r *http.Request, e *auditing.Entry, k keyring.KEK) (any, error) {
	var in versionBody
	if err := decodeOptional(r, &in); err != nil {
		return nil, err
	}
	return a.changeVersion(r.Context(), e, k, in.Version, a.keks.Store.Enable)
}

// changeVersion changes a version of a KEK, or the whole KEK if version is 0.
func (a *api) changeVersion(ctx context.Context, e *auditing.Entry, k keyring.KEK, version int, change func(ctx context.Context, id string, version int, c keystore.Change) (keystore.KEK, error)) (keyring.Info, error) {
	if version < 0 {
		return keyring.Info{}, fmt.Errorf("%w: version %d is not 1 or more", keystore.ErrInput, version)
	}
	e.Version = version
	var err error
	k.KEK, err = change(ctx, k.ID, version, k.Change(a.keks.Before(e)))
	return a.changed(ctx, k, err)
}

// DestroyAfter is how long a version that is to be destroyed can be enabled again, by
// default.
const DestroyAfter = 7 * 24 * time.Hour

// destroyBody is a request to destroy a version after some time.
type destroyBody struct {
	versionBody
	After *seconds `json:"afterSeconds,omitempty"`
}

type seconds int64

// maxDestroyAfter is the longest time before a version is destroyed: ten years.
const maxDestroyAfter seconds = 10 * 365 * 24 * 3600

func (a *api) destroy(r *http.Request, e *auditing.Entry, k keyring.KEK) (any, error) {
	var in destroyBody
	if err := decodeOptional(r, &in); err != nil {
		return nil, err
	}
	after := seconds(DestroyAfter / time.Second)
	if in.After != nil {
		after = *in.After
	}
	return a.destroyVersion(r.Context(), e, k, in.Version, after)
}

// destroyVersion destroys a version, or all if version is 0, after that time.
func (a *api) destroyVersion(ctx context.Context, e *auditing.Entry, k keyring.KEK, version int, after seconds) (keyring.Info, error) {
	if after < 0 || after > maxDestroyAfter {
		return keyring.Info{}, fmt.Errorf("%w: afterSeconds %d is not from 0 to %d (ten years)", keystore.ErrInput, after, maxDestroyAfter)
	}
	what := "all versions"
	if version != 0 {
		what = fmt.Sprintf("version %d", version)
	}
	if err := a.approved(ctx, e, opDestroy, fmt.Sprintf("%s, %s after it is run", what, time.Duration(after)*time.Second)); err != nil {
		return keyring.Info{}, err
	}
	return a.changeVersion(ctx, e, k, version, func(ctx context.Context, id string, version int, c keystore.Change) (keystore.KEK, error) {
		at := time.Now().Add(time.Duration(after) * time.Second)
		e.Reason = "the key is gone from " + at.UTC().Format(time.RFC3339) + " on"
		return a.keks.Store.Destroy(ctx, id, version, at, c)
	})
}

// identityBody is a request about an identity.
type identityBody struct {
	Identity string `json:"identity"`
}

func (a *api) revoke(r *http.Request, e *auditing.Entry, k keyring.KEK) (any, error) {
	var in identityBody
	if err := decodeBody(r, &in); err != nil {
		return nil, err
	}
	return a.changeIdentity(r.Context(), e, k, in.Identity, a.keks.Store.Revoke)
}

func (a *api) reinstate(r *http.Request, e *auditing.Entry, k keyring.KEK) (any, error) {
	var in identityBody
	if err := decodeBody(r, &in); err != nil {
		return nil, err
	}
	return a.changeIdentity(r.Context(), e, k, in.Identity, a.keks.Store.Reinstate)
}

// changeIdentity changes whether a KEK is revoked for an identity.
func (a *api) changeIdentity(ctx context.Context, e *auditing.Entry, k keyring.KEK, identity string, change func(ctx context.Context, id, identity string, c keystore.Change) (keystore.KEK, error)) (keyring.Info, error) {
	var err error
	// Revocations of earlier versions may be spelled in another way.
	if !slices.Contains(k.Revoked, identity) {
		if identity, err = policy.Canonical(identity, a.callers.Issuers.Names()); err != nil {
			return keyring.Info{}, fmt.Errorf("%w: %w", keystore.ErrInput, err)
		}
	}
	e.Subject = identity
	k.KEK, err = change(ctx, k.ID, identity, k.Change(a.keks.Before(e)))
	return a.changed(ctx, k, err)
}

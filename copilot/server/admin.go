package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/policy"
)

// Info describes a KEK without its key.
type Info struct {
	ID string `json:"id"`
	// Backend is the KMS in which the KEK lives; empty for the broker's store.
	Backend string `json:"backend,omitempty"`
	Type    string `json:"type,omitempty"` // of the backend
	Path    string `json:"path,omitempty"` // there
	// StaysInKMS says that the KEK wraps inside its KMS and is never given out.
	StaysInKMS bool `json:"staysInKMS,omitempty"`
	// Version is the current one; 0 if the KMS keeps that to itself.
	Version  int           `json:"version,omitempty"`
	Disabled bool          `json:"disabled,omitempty"`
	Revoked  []string      `json:"revoked,omitempty"` // identities
	Versions []VersionInfo `json:"versions"`
}

// VersionInfo describes one version of a KEK.
type VersionInfo struct {
	Version   int            `json:"version"`
	Created   time.Time      `json:"created,omitzero"`
	Bits      int            `json:"bits,omitempty"`
	State     keystore.State `json:"state"`
	DestroyAt time.Time      `json:"destroyAt,omitzero"`
	// Wraps is how many keys it has wrapped, at most.
	Wraps int64 `json:"wraps"`
}

func (b *broker) describe(ctx context.Context, k kek) (Info, error) {
	wraps, err := b.keks.store.Wraps(ctx, k.ID)
	i := Info{ID: k.ID, Backend: k.Backend, Type: b.keks.types[k.Backend], Path: k.path, StaysInKMS: !k.wrapsHere(), Disabled: k.Disabled, Revoked: k.Revoked, Versions: []VersionInfo{}}
	if k.Backend == "" {
		i.Version = k.Current()
	}
	for _, v := range k.Versions {
		i.Versions = append(i.Versions, VersionInfo{v.Version, v.Created, v.Bits, v.In(time.Now()), v.DestroyAt, wraps[v.Version]})
	}
	if k.Backend != "" {
		for version, n := range wraps {
			if _, known := k.KEK.Version(version); !known {
				i.Versions = append(i.Versions, VersionInfo{Version: version, State: keystore.Enabled, Wraps: n})
			}
		}
		slices.SortFunc(i.Versions, func(a, b VersionInfo) int { return a.Version - b.Version })
	}
	return i, err
}

func (a *api) create(r *http.Request, e *entry) (any, error) {
	var in newKEK
	// Whether it may be made is known only once its name is.
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
	if !a.owner {
		if v := a.decide(e.Who, e.KEK, policy.Admin); !v.Allowed {
			return nil, &refusal{who: e.Who, reason: v.Reason}
		}
	}
	if conf, ok := a.keks.conf[in.ID]; ok {
		return nil, fmt.Errorf("%w: the configuration says that it lives in %s: make it there", keystore.ErrExists, conf.Backend)
	}
	k, err := a.keks.store.Create(r.Context(), in.ID, key, keystore.Change{Log: a.keks.beforeVersion(e)})
	return a.changed(r.Context(), kek{KEK: k}, err)
}

type newKEK struct {
	ID  string  `json:"id"`
	Key *[]byte `json:"key,omitempty"` // to import; absent: a new random one
}

// changed answers a change with what became of the KEK.
func (a *api) changed(ctx context.Context, k kek, err error) (Info, error) {
	if err != nil {
		return Info{}, err
	}
	// It is made, even if it can't be said how many keys were wrapped.
	info, err := a.describe(ctx, k)
	if err != nil {
		logrus.WithError(err).WithField("kek", k.ID).Warn("changed, and the number of wraps is not known")
	}
	return info, nil
}

func (a *api) rotate(r *http.Request, e *entry) (any, error) {
	k, err := a.allowed(r.Context(), e, policy.Admin)
	if err == nil {
		err = decodeOptional(r, &struct{}{})
	}
	if err != nil {
		return nil, err
	}
	k, err = a.keks.rotate(r.Context(), k, 0, e)
	if err != nil {
		return nil, err
	}
	info, err := a.changed(r.Context(), k, nil)
	info.Version = e.Version // which the KEK does not say if it is in a KMS
	return info, err
}

// versionBody tells a version, or all of them if it is absent.
type versionBody struct {
	Version int `json:"version,omitempty"`
}

// changeVersion makes a change of a KEK or of one of its versions.
func (a *api) changeVersion(r *http.Request, e *entry, in *versionBody, body any, change func(ctx context.Context, id string, version int, c keystore.Change) (keystore.KEK, error)) (any, error) {
	k, err := a.allowed(r.Context(), e, policy.Admin)
	if err == nil {
		err = decodeOptional(r, body)
	}
	if err == nil && in.Version < 0 {
		err = fmt.Errorf("%w: version %d is not from 1", keystore.ErrInput, in.Version)
	}
	if err != nil {
		return nil, err
	}
	e.Version = in.Version
	k.KEK, err = change(r.Context(), k.ID, in.Version, k.change(a.keks.before(e)))
	return a.changed(r.Context(), k, err)
}

func (a *api) disable(r *http.Request, e *entry) (any, error) {
	var in versionBody
	return a.changeVersion(r, e, &in, &in, a.keks.store.Disable)
}

func (a *api) enable(r *http.Request, e *entry) (any, error) {
	var in versionBody
	return a.changeVersion(r, e, &in, &in, a.keks.store.Enable)
}

// DestroyAfter is how long a version that is to be destroyed can be enabled
// again, if nothing else is said.
const DestroyAfter = 7 * 24 * time.Hour

// destroyBody tells what to destroy, and when.
type destroyBody struct {
	versionBody
	After *seconds `json:"afterSeconds,omitempty"`
}

type seconds int64

func (a *api) destroy(r *http.Request, e *entry) (any, error) {
	var in destroyBody
	return a.changeVersion(r, e, &in.versionBody, &in, func(ctx context.Context, id string, version int, c keystore.Change) (keystore.KEK, error) {
		after := DestroyAfter
		if in.After != nil {
			if *in.After < 0 || *in.After > 10*365*24*3600 {
				return keystore.KEK{}, fmt.Errorf("%w: afterSeconds %d is not from 0 to ten years", keystore.ErrInput, *in.After)
			}
			after = time.Duration(*in.After) * time.Second
		}
		at := time.Now().Add(after)
		e.Reason = "the key is gone from " + at.UTC().Format(time.RFC3339) + " on"
		return a.keks.store.Destroy(ctx, id, version, at, c)
	})
}

// identityBody tells whom a revocation is about.
type identityBody struct {
	Identity string `json:"identity"`
}

func (a *api) changeIdentity(r *http.Request, e *entry, change func(ctx context.Context, id, identity string, c keystore.Change) (keystore.KEK, error)) (any, error) {
	var in identityBody
	k, err := a.allowed(r.Context(), e, policy.Admin)
	if err == nil {
		err = decodeBody(r, &in)
	}
	if err != nil {
		return nil, err
	}
	// What was revoked by an earlier version may be spelled in another way.
	if !slices.Contains(k.Revoked, in.Identity) {
		if in.Identity, err = policy.Canonical(in.Identity, a.issuers.names()); err != nil {
			return nil, fmt.Errorf("%w: %w", keystore.ErrInput, err)
		}
	}
	e.Subject = in.Identity
	k.KEK, err = change(r.Context(), k.ID, in.Identity, k.change(a.keks.before(e)))
	return a.changed(r.Context(), k, err)
}

func (a *api) revoke(r *http.Request, e *entry) (any, error) {
	return a.changeIdentity(r, e, a.keks.store.Revoke)
}

func (a *api) reinstate(r *http.Request, e *entry) (any, error) {
	return a.changeIdentity(r, e, a.keks.store.Reinstate)
}

// decodeOptional decodes a body that may be empty.
func decodeOptional(r *http.Request, v any) error {
	var first [1]byte
	if _, err := io.ReadFull(r.Body, first[:]); errors.Is(err, io.EOF) {
		return nil
	} else if err != nil {
		return err
	}
	r.Body = struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(first[:]), r.Body), r.Body}
	return decodeBody(r, v)
}

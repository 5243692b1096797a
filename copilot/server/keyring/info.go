package keyring

import (
	"context"
	"slices"
	"time"

	"github.com/ctrlplane/pilot/copilot/keystore"
)

// Info describes a KEK without its key.
type Info struct {
	ID string `json:"id"`
	// Backend is the KMS that holds the KEK; empty for the broker's store.
	Backend string `json:"backend,omitempty"`
	Type    string `json:"type,omitempty"` // of the backend
	Path    string `json:"path,omitempty"` // there
	// StaysInKMS says that the KEK wraps inside its KMS and is never exported.
	StaysInKMS bool `json:"staysInKMS,omitempty"`
	// Version is the current one; 0 if it is in a KMS.
	Version  int           `json:"version,omitempty"`
	Disabled bool          `json:"disabled,omitempty"`
	Revoked  []string      `json:"revoked,omitempty"` // identities
	Versions []VersionInfo `json:"versions"`
	// Problem is why the KEK can't be used, whatever the rest says: its record is damaged, or
	// was put back or deleted. Lists have it, for admins.
	Problem string `json:"problem,omitempty"`
}

// VersionInfo describes one version of a KEK.
type VersionInfo struct {
	Version   int            `json:"version"`
	Created   time.Time      `json:"created,omitzero"`
	Bits      int            `json:"bits,omitempty"`
	State     keystore.State `json:"state"`
	DestroyAt time.Time      `json:"destroyAt,omitzero"`
	// Wraps is an upper bound of the keys that it has wrapped.
	Wraps int64 `json:"wraps"`
}

// Describe returns what is known of a KEK. If its wraps can't be read, the rest is there,
// and an error.
func (r *Keyring) Describe(ctx context.Context, k KEK) (Info, error) {
	wraps, err := r.Store.Wraps(ctx, k.ID)
	i := Info{ID: k.ID, Backend: k.Backend, Type: r.Type(k), Path: k.Path, StaysInKMS: !k.WrapsHere(), Disabled: k.Disabled, Revoked: k.Revoked, Versions: []VersionInfo{}}
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

// Type returns the type of a KEK's KMS, or "" if it is in the broker's store.
func (r *Keyring) Type(k KEK) string { return r.types[k.Backend] }

// Location returns where the configuration says that a KEK is, and whether it does.
func (r *Keyring) Location(id string) (Location, bool) {
	l, ok := r.located[id]
	return l, ok
}

// Package keyring is the broker's KEKs, in its store and in key management systems
// (KMSs): it gets their keys, wraps and unwraps with them, and rotates them.
package keyring

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/server/auditing"
	"github.com/ctrlplane/pilot/internal/exit"
)

// Location is where a KEK in a KMS is.
type Location struct {
	Backend string `toml:"backend"`
	Path    string `toml:"path"` // there
}

// Config is the part of the broker's configuration that its keyring needs.
type Config struct {
	// Backends are KMSs by name: a type, and the settings of that type.
	Backends map[string]map[string]any
	// KMS are the types that Backends may have.
	KMS kms.Types
	// KEKs are those in Backends.
	KEKs map[string]Location
	// WrapLimit is how many keys a version of a KEK may wrap.
	WrapLimit int64
}

// Keyring has the KEKs of a store and of KMSs. It is safe for concurrent use.
type Keyring struct {
	// Store holds what the broker knows of each KEK.
	Store    *keystore.Store
	backends map[string]kms.Backend
	types    map[string]string // of the backends
	located  map[string]Location
	limit    int64 // wraps of a version
	audit    *auditing.Log
	metrics  *Metrics

	mu     sync.Mutex
	warned map[string]bool // versions that come near the limit

	rotating chan struct{}  // holds one during a rotation of rotateFull
	full     map[string]int // by id, the last version that was rotated because it was full
}

// kmsTimeout bounds a call of a KMS.
const kmsTimeout = 8 * time.Second

// ExportWraps is how many wraps an exported KEK counts, in its current version, unless
// the client says how many it needs.
const ExportWraps = 1024

var (
	// ErrNotExported is the error of exporting a KEK that does not leave the broker or its
	// KMS.
	ErrNotExported = errors.New("this KEK is not exported: have copilot wrap and unwrap with it")
	// ErrLimit is the error of wrapping with a KEK that has wrapped as many keys as it may.
	ErrLimit = errors.New("the KEK has wrapped as many keys as it may, and copilot can't rotate it: rotate it in its KMS")
)

// Verdict returns the audit log's verdict on an error of a keyring, its store or its
// KMSs.
func Verdict(err error) string {
	is := func(targets ...error) bool {
		return slices.ContainsFunc(targets, func(t error) bool { return errors.Is(err, t) })
	}
	switch {
	case is(ErrNotExported, ErrLimit):
		return audit.Denied
	case is(audit.ErrUnavailable, keystore.ErrUnavailable, kms.ErrUnavailable, kms.ErrForbidden):
		return audit.Failed
	case is(keystore.ErrDisabled, keystore.ErrNotFound, kms.ErrNotFound):
		return audit.Denied
	}
	return audit.Failed
}

// New connects to the KMSs of a configuration. Changes of KEKs go to log. [Keyring.Close]
// closes the KMSs, and not the store.
func New(conf Config, store *keystore.Store, log *auditing.Log, m *Metrics) (_ *Keyring, err error) {
	m.wrapLimit.Set(float64(conf.WrapLimit))
	r := &Keyring{
		Store: store, backends: make(map[string]kms.Backend), types: make(map[string]string),
		located: conf.KEKs, limit: conf.WrapLimit, audit: log, metrics: m,
		rotating: make(chan struct{}, 1),
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	for name, settings := range conf.Backends {
		if r.backends[name], err = OpenBackend(conf.KMS, settings); err != nil {
			delete(r.backends, name)
			return nil, exit.Usagef("backends.%s: %w", name, err)
		}
		r.types[name], _ = settings["type"].(string)
		m.backend(name, r.backends[name])
	}
	return r, nil
}

// Close closes the KMSs.
func (r *Keyring) Close() error {
	var errs []error
	for _, b := range r.backends {
		errs = append(errs, b.Close())
	}
	return errors.Join(errs...)
}

// OpenBackend opens a KMS of a configuration.
func OpenBackend(types kms.Types, settings map[string]any) (kms.Backend, error) {
	kind, ok := settings["type"].(string)
	if !ok {
		return nil, errors.New("type is not set")
	}
	rest := maps.Clone(settings)
	delete(rest, "type")
	return types.Open(kind, func(v any) error {
		b, err := toml.Marshal(rest)
		if err != nil {
			return err
		}
		err = toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(v)
		if strict := new(toml.StrictMissingError); errors.As(err, &strict) && len(strict.Errors) > 0 {
			return fmt.Errorf("%s: unknown setting of a backend of type %s", strict.Errors[0].Key()[0], kind)
		}
		return err
	})
}

// KEK is a KEK, and where its key is if not in the store.
type KEK struct {
	keystore.KEK
	// Who uses it: an identity.
	Who string
	// Path is where it is in its KMS.
	Path    string
	backend kms.Backend
}

// Find returns a KEK. Errors wrap [keystore.ErrNotFound].
func (r *Keyring) Find(ctx context.Context, id string) (KEK, error) {
	k := KEK{}
	var err error
	k.KEK, err = r.Store.Get(ctx, id)
	conf, elsewhere := r.located[id]
	if !elsewhere {
		if err == nil && k.Backend != "" {
			err = fmt.Errorf("%w: it was in %s, and the configuration does not mention it any more", keystore.ErrNotFound, k.Backend)
		}
		return k, err
	}
	if errors.Is(err, keystore.ErrNotFound) {
		// A record that was deleted may have said that the KEK is disabled or revoked.
		k.KEK, err = keystore.KEK{ID: id}, r.Store.Absent(ctx, id)
		k.Backend = conf.Backend
	}
	if err == nil && k.Backend == "" {
		err = fmt.Errorf("KEK %q is in the store, and the configuration says that it is in %s: use another name there", id, conf.Backend)
	}
	k.backend, k.Path = r.backends[conf.Backend], conf.Path
	return k, err
}

// List returns the KEKs whose ids are wanted, in the order of their ids. Others are not
// read.
func (r *Keyring) List(ctx context.Context, wanted func(id string) bool) ([]KEK, error) {
	stored, err := r.Store.List(ctx, wanted)
	if errors.Is(err, keystore.ErrUnavailable) {
		return nil, err
	}
	if err != nil {
		logrus.WithError(err).Error("KEKs are missing from the list")
	}
	return r.locate(ctx, stored, wanted, func(_ string, err error) {
		logrus.WithError(err).Error("KEK is missing from the list")
	})
}

// ListChecked is [Keyring.List] with those that can't be used since their records are damaged,
// or were put back or deleted, and with why, by id. The store was changed least times.
func (r *Keyring) ListChecked(ctx context.Context, least int64, wanted func(id string) bool) (list []KEK, problems map[string]string, err error) {
	stored, bad, err := r.Store.ListChecked(ctx, least)
	if err != nil {
		return nil, nil, err
	}
	stored = slices.DeleteFunc(stored, func(k keystore.KEK) bool { return !wanted(k.ID) })
	problems = make(map[string]string)
	for name, why := range bad {
		if id, ok := keystore.KEKOf(name); ok && wanted(id) {
			problems[id] = why
		}
	}
	list, err = r.locate(ctx, stored, wanted, func(id string, err error) { problems[id] = cmp.Or(problems[id], err.Error()) })
	if err != nil {
		return nil, nil, err
	}
	for id := range problems {
		if !slices.ContainsFunc(list, func(k KEK) bool { return k.ID == id }) {
			list = append(list, KEK{KEK: keystore.KEK{ID: id}})
		}
	}
	slices.SortFunc(list, func(a, b KEK) int { return cmp.Compare(a.ID, b.ID) })
	return list, problems, nil
}

// locate returns those that are stored, and those in KMSs that are wanted, in the order of
// their ids. It calls failed with one that is not found, which is missing.
func (r *Keyring) locate(ctx context.Context, stored []keystore.KEK, wanted func(id string) bool, failed func(id string, err error)) ([]KEK, error) {
	all := make(map[string]KEK)
	for _, k := range stored {
		all[k.ID] = KEK{KEK: k}
	}
	for id := range r.located {
		if !wanted(id) {
			continue
		}
		k, err := r.Find(ctx, id)
		if errors.Is(err, keystore.ErrUnavailable) {
			return nil, err
		}
		if err != nil {
			failed(id, err)
			continue
		}
		all[id] = k
	}
	return slices.SortedFunc(maps.Values(all), func(a, b KEK) int { return cmp.Compare(a.ID, b.ID) }), nil
}

// Change returns how a change of k is logged and recorded.
func (k KEK) Change(log func(keystore.KEK) error) keystore.Change {
	return keystore.Change{Log: log, Backend: k.Backend}
}

// WrapsHere reports whether copilot has the key to wrap with. Otherwise its KMS keeps it.
func (k KEK) WrapsHere() bool {
	_, gives := k.backend.(kms.Giver)
	return k.backend == nil || gives
}

// Key returns the key of a version, or of the current one if version is 0, and that
// version. The caller clears the key. Errors wrap [ErrNotExported] if the KMS keeps it.
func (r *Keyring) Key(ctx context.Context, k KEK, version int) ([]byte, int, error) {
	if k.backend == nil {
		return r.Store.Key(k.KEK, version)
	}
	giver, ok := k.backend.(kms.Giver)
	if !ok {
		return nil, 0, ErrNotExported
	}
	if err := r.Store.CheckUse(k.KEK, version); err != nil {
		return nil, 0, err
	}
	var key []byte
	v := version
	err := r.call(ctx, k, "get", func(ctx context.Context) (err error) {
		key, v, err = giver.Key(ctx, k.Path, version)
		return err
	})
	if err == nil && version == 0 {
		err = r.Store.CheckUse(k.KEK, v)
	}
	if err != nil {
		clear(key)
		return nil, 0, err
	}
	return key, v, nil
}

// call calls a KMS.
func (r *Keyring) call(ctx context.Context, k KEK, operation string, do func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, kmsTimeout)
	defer cancel()
	start := time.Now()
	err := do(ctx)
	if err != nil && ctx.Err() != nil && !errors.Is(err, kms.ErrUnavailable) {
		err = fmt.Errorf("%w: %w", kms.ErrUnavailable, err)
	}
	r.metrics.call(k.Backend, operation, time.Since(start), err)
	if err != nil {
		return fmt.Errorf("%s: %w", k.Backend, err)
	}
	return nil
}

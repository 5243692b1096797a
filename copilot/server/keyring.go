package server

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
	"github.com/ctrlplane/pilot/internal/exit"
)

// keyring has the KEKs of the store and those that live in KMSs.
type keyring struct {
	store    *keystore.Store
	backends map[string]kms.Backend
	types    map[string]string // of the backends
	conf     map[string]KEKConfig
	limit    int64 // wraps of a version
	audit    *audit.Log
	metrics  *metrics

	mu     sync.Mutex
	warned map[string]bool // versions that come near the limit

	rotating sync.Mutex
	full     map[string]int // by id, the last version that was rotated because it was full
}

// kmsWithin bounds a call of a KMS.
const kmsWithin = 8 * time.Second

// exportWraps is how many wraps a KEK counts that is handed out in its current
// version to somebody who does not say how many it is for.
const exportWraps = 1024

var (
	// errNotExported: the caller may use the KEK but does not get it.
	errNotExported = errors.New("this KEK is not given out: have copilot wrap and unwrap with it")
	// errLimit: a version has wrapped as many keys as it may.
	errLimit = errors.New("the KEK has wrapped as many keys as it may, and copilot can't rotate it: rotate it in its KMS")
)

func newKeyring(conf Config, store *keystore.Store, log *audit.Log, m *metrics) (_ *keyring, err error) {
	m.wrapLimit.Set(float64(conf.WrapLimit))
	r := &keyring{store: store, backends: make(map[string]kms.Backend), types: make(map[string]string), conf: conf.KEKs, limit: conf.WrapLimit, audit: log, metrics: m}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	for name, settings := range conf.Backends {
		if r.backends[name], err = openBackend(conf.KMS, settings); err != nil {
			delete(r.backends, name)
			return nil, exit.Usagef("backends.%s: %w", name, err)
		}
		r.types[name], _ = settings["type"].(string)
		m.backend(name, r.backends[name])
	}
	return r, nil
}

func (r *keyring) close() error {
	var errs []error
	for _, b := range r.backends {
		errs = append(errs, b.Close())
	}
	return errors.Join(errs...)
}

func openBackend(types kms.Types, settings map[string]any) (kms.Backend, error) {
	kind, ok := settings["type"].(string)
	if !ok {
		return nil, errors.New("type says what it is")
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
			return fmt.Errorf("%s: a backend of type %s has no such setting", strict.Errors[0].Key()[0], kind)
		}
		return err
	})
}

// kek is a KEK, and where its key lives if that is not the store.
type kek struct {
	keystore.KEK
	backend kms.Backend
	path    string
	who     string // uses it
}

// find returns a KEK that is known. Errors wrap [keystore.ErrNotFound].
func (r *keyring) find(ctx context.Context, id string) (kek, error) {
	k := kek{}
	var err error
	k.KEK, err = r.store.Get(ctx, id)
	conf, elsewhere := r.conf[id]
	if !elsewhere {
		if err == nil && k.Backend != "" {
			err = fmt.Errorf("%w: it lived in %s, which the configuration no longer says", keystore.ErrNotFound, k.Backend)
		}
		return k, err
	}
	if errors.Is(err, keystore.ErrNotFound) {
		k.KEK, err = keystore.KEK{ID: id}, nil
		k.Backend = conf.Backend
	}
	if err == nil && k.Backend == "" {
		err = fmt.Errorf("KEK %q is in the store, and the configuration says that it lives in %s: take another name there", id, conf.Backend)
	}
	k.backend, k.path = r.backends[conf.Backend], conf.Path
	return k, err
}

// list returns the KEKs whose ids are wanted, in the order of their ids. The others
// are not read.
func (r *keyring) list(ctx context.Context, wanted func(id string) bool) ([]kek, error) {
	stored, err := r.store.List(ctx, wanted)
	if errors.Is(err, keystore.ErrUnavailable) {
		return nil, err
	}
	if err != nil {
		logrus.WithError(err).Error("KEKs are missing in the list")
	}
	all := make(map[string]kek)
	for _, k := range stored {
		all[k.ID] = kek{KEK: k}
	}
	for id := range r.conf {
		if !wanted(id) {
			continue
		}
		k, err := r.find(ctx, id)
		if errors.Is(err, keystore.ErrUnavailable) {
			return nil, err
		}
		if err != nil {
			logrus.WithError(err).Error("KEK is missing in the list")
			continue
		}
		all[id] = k
	}
	return slices.SortedFunc(maps.Values(all), func(a, b kek) int { return cmp.Compare(a.ID, b.ID) }), nil
}

// change returns what a change of k is to be logged and recorded as.
func (k kek) change(log func(keystore.KEK) error) keystore.Change {
	return keystore.Change{Log: log, Backend: k.Backend}
}

// wrapsHere reports whether the key is given to copilot to wrap with.
func (k kek) wrapsHere() bool {
	_, gives := k.backend.(kms.Giver)
	return k.backend == nil || gives
}

// key returns the key of a version, or of the current one if version is 0, and
// that version. The caller clears the key. Errors wrap errNotExported if the
// KMS keeps it.
func (r *keyring) key(ctx context.Context, k kek, version int) ([]byte, int, error) {
	if k.backend == nil {
		return r.store.Key(k.KEK, version)
	}
	giver, ok := k.backend.(kms.Giver)
	if !ok {
		return nil, 0, errNotExported
	}
	if err := r.store.CheckUse(k.KEK, version); err != nil {
		return nil, 0, err
	}
	var key []byte
	v := version
	err := r.call(ctx, k, "get", func(ctx context.Context) (err error) {
		key, v, err = giver.Key(ctx, k.path, version)
		return err
	})
	if err == nil && version == 0 {
		err = r.store.CheckUse(k.KEK, v)
	}
	if err != nil {
		clear(key)
		return nil, 0, err
	}
	return key, v, nil
}

// call calls a KMS.
func (r *keyring) call(ctx context.Context, k kek, operation string, do func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, kmsWithin)
	defer cancel()
	start := time.Now()
	err := do(ctx)
	if err != nil && ctx.Err() != nil && !errors.Is(err, kms.ErrUnavailable) {
		err = fmt.Errorf("%w: %w", kms.ErrUnavailable, err)
	}
	r.metrics.kms(k.Backend, operation, time.Since(start), err)
	if err != nil {
		return fmt.Errorf("%s: %w", k.Backend, err)
	}
	return nil
}

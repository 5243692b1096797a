package copilot

import (
	"bytes"
	"cmp"
	"context"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
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
)

// keyring has the KEKs of the store and those that live in KMSs.
type keyring struct {
	store    *keystore.Store
	backends map[string]kms.Backend
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

// Methods of wrapped keys, as in pilot's annotations.
const (
	methodA256GCMKW = "A256GCMKW" // with a KEK that copilot has
	methodCopilot   = "copilot"   // inside a KMS
)

var (
	// errNotExported: the caller may use the KEK but does not get it.
	errNotExported = errors.New("this KEK is not given out: have copilot wrap and unwrap with it")
	// errLimit: a version has wrapped as many keys as it may.
	errLimit = errors.New("the KEK has wrapped as many keys as it may, and copilot can't rotate it: rotate it in its KMS")
)

func newKeyring(conf Config, store *keystore.Store, log *audit.Log, m *metrics) (_ *keyring, err error) {
	r := &keyring{store: store, backends: make(map[string]kms.Backend), conf: conf.KEKs, limit: conf.WrapLimit, audit: log, metrics: m}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	for name, settings := range conf.Backends {
		if r.backends[name], err = openBackend(settings); err != nil {
			delete(r.backends, name)
			return nil, fmt.Errorf("backends.%s: %w", name, err)
		}
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

func openBackend(settings map[string]any) (kms.Backend, error) {
	kind, ok := settings["type"].(string)
	if !ok {
		return nil, errors.New("type says what it is")
	}
	rest := maps.Clone(settings)
	delete(rest, "type")
	return kms.Open(kind, func(v any) error {
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

// list returns all KEKs, in the order of their names.
func (r *keyring) list(ctx context.Context) ([]kek, error) {
	stored, err := r.store.List(ctx)
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

// current returns the current version's key, to wrap n keys with, which it
// counts. A version that has wrapped as many as it may is rotated first.
func (r *keyring) current(ctx context.Context, k kek, n int64) ([]byte, int, error) {
	for range 3 {
		key, version, err := r.key(ctx, k, 0)
		if err != nil {
			return nil, 0, err
		}
		over, err := r.count(ctx, k, version, n)
		if err == nil && !over {
			return key, version, nil
		}
		clear(key)
		if err == nil {
			err = r.rotateFull(ctx, k, version)
		}
		if err != nil {
			return nil, 0, err
		}
		who := k.who
		if k, err = r.find(ctx, k.ID); err != nil {
			return nil, 0, err
		}
		k.who = who
	}
	return nil, 0, fmt.Errorf("%w: others rotate the KEK at the same time", keystore.ErrUnavailable)
}

// count counts n keys that a version wraps, and reports whether they are too
// many. It warns from three quarters on.
func (r *keyring) count(ctx context.Context, k kek, version int, n int64) (over bool, err error) {
	sum, err := r.store.Count(ctx, k.ID, version, n, r.limit)
	if err != nil {
		return false, err
	}
	r.metrics.wraps(k.ID, version, sum)
	if sum > r.limit/4*3 && r.firstWarning(k.ID, version) {
		logrus.WithFields(logrus.Fields{"kek": k.ID, "version": version, "wraps": sum, "limit": r.limit}).Warn("KEK comes near the number of keys that it may wrap: rotate it")
	}
	return sum > r.limit, nil
}

func (r *keyring) firstWarning(id string, version int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	key := fmt.Sprintf("%d %s", version, id)
	if r.warned == nil {
		r.warned = make(map[string]bool)
	}
	was := r.warned[key]
	r.warned[key] = true
	return !was
}

// rotateFull rotates a KEK whose current version has wrapped enough.
func (r *keyring) rotateFull(ctx context.Context, k kek, version int) error {
	// Others have seen that it is full, too.
	r.rotating.Lock()
	defer r.rotating.Unlock()
	if r.full[k.ID] >= version {
		return nil
	}
	e := audit.Entry{Action: "rotate", KEK: k.ID, Who: "copilot", From: "copilot", Verdict: audit.Allowed,
		Reason: fmt.Sprintf("version %d has wrapped as many keys as it may, %d, the last for %s", version, r.limit, k.who)}
	_, err := r.rotate(ctx, k, version, &entry{Entry: e})
	if errors.Is(err, keystore.ErrState) {
		return nil // another replica was first
	}
	if err == nil {
		if r.full == nil {
			r.full = make(map[string]int)
		}
		r.full[k.ID] = version
		logrus.WithFields(logrus.Fields{"kek": k.ID, "version": version}).Warn("KEK rotated: it has wrapped as many keys as it may")
	}
	return err
}

// rotate makes a new version, unless from is not 0 and no longer the current
// one, and logs e before.
func (r *keyring) rotate(ctx context.Context, k kek, from int, e *entry) (kek, error) {
	if k.backend == nil {
		var err error
		k.KEK, err = r.store.Rotate(ctx, k.ID, from, k.change(r.beforeVersion(e)))
		return k, err
	}
	rotator, ok := k.backend.(kms.Rotator)
	if !ok {
		if from != 0 {
			return k, errLimit
		}
		return k, fmt.Errorf("%w: copilot can't rotate keys in %s: rotate it there", keystore.ErrState, k.Backend)
	}
	// What will be made is known only afterwards.
	if err := r.before(e)(k.KEK); err != nil {
		return k, err
	}
	var version int
	err := r.call(ctx, k, "rotate", func(ctx context.Context) (err error) {
		version, err = rotator.Rotate(ctx, k.path)
		return err
	})
	e.Version = version
	e.written = false // again, with the version or what went wrong
	return k, err
}

// before returns what writes e down as done right before a change is made.
func (r *keyring) before(e *entry) func(keystore.KEK) error {
	return func(keystore.KEK) error {
		if err := r.audit.Write(e.Entry); err != nil {
			return err
		}
		e.written = true
		return nil
	}
}

// beforeVersion does so for a change that makes a version, which it notes in e.
func (r *keyring) beforeVersion(e *entry) func(keystore.KEK) error {
	return func(k keystore.KEK) error {
		e.Version = k.Current()
		return r.before(e)(k)
	}
}

// entry is an audit entry that is being made.
type entry struct {
	audit.Entry
	written bool // as what was done, which may yet fail
}

// wrap wraps plaintext with the current version, inside the KMS if that does
// not give the key out.
func (r *keyring) wrap(ctx context.Context, k kek, plaintext []byte) (wrapped, error) {
	if !k.wrapsHere() {
		return r.wrapInside(ctx, k, plaintext)
	}
	key, version, err := r.current(ctx, k, 1)
	if err != nil {
		return wrapped{}, err
	}
	defer clear(key)
	aead, err := newGCM(key)
	if err != nil {
		return wrapped{}, err
	}
	w := wrapped{Version: version, Method: methodA256GCMKW, IV: make([]byte, aead.NonceSize())}
	rand.Read(w.IV) // never fails
	w.Key = aead.Seal(nil, w.IV, plaintext, additionalData(k.ID, version))
	return w, nil
}

func (r *keyring) wrapInside(ctx context.Context, k kek, plaintext []byte) (w wrapped, err error) {
	wrapper, ok := k.backend.(kms.Wrapper)
	if !ok {
		return wrapped{}, fmt.Errorf("%s neither gives keys out nor wraps", k.Backend)
	}
	if err := r.store.CheckUse(k.KEK, 0); err != nil {
		return wrapped{}, err
	}
	// The KMS wraps a key of ours, which seals the plaintext: so it is bound
	// to the KEK's name, and may have any size, whatever the KMS can do.
	inner := make([]byte, kms.MaxPlaintext)
	rand.Read(inner) // never fails
	defer clear(inner)
	var wrappedInner []byte
	err = r.call(ctx, k, "wrap", func(ctx context.Context) (err error) {
		w.Version, wrappedInner, err = wrapper.Wrap(ctx, k.path, inner)
		return err
	})
	if err == nil {
		err = r.store.CheckUse(k.KEK, w.Version)
	}
	if err != nil {
		return wrapped{}, err
	}
	over, err := r.count(ctx, k, w.Version, 1)
	if err == nil && over {
		err = r.rotateFull(ctx, k, w.Version)
	}
	if err != nil {
		return wrapped{}, err
	}
	aead, err := newGCM(inner)
	if err != nil {
		return wrapped{}, err
	}
	w.Method = methodCopilot
	w.Key, err = json.Marshal(envelope{wrappedInner, keystore.Seal(aead, plaintext, place(k.ID, w.Version))})
	return w, err
}

// envelope is a key that was wrapped inside a KMS.
type envelope struct {
	Key    []byte `json:"key"`    // 32 bytes, wrapped by the KMS
	Sealed []byte `json:"sealed"` // 12-byte nonce, what was sealed with that key, 16-byte tag
}

// unwrap undoes wrap, and what pilot wrapped itself with a KEK that it was
// given. Errors wrap [kms.ErrUnwrap] if the key was not made by this KEK and
// version, or was changed.
func (r *keyring) unwrap(ctx context.Context, k kek, w wrapped) ([]byte, error) {
	switch {
	case w.Method == methodCopilot && w.IV == nil && !k.wrapsHere():
		return r.unwrapInside(ctx, k, w.Version, w.Key)
	case w.Method == methodA256GCMKW && len(w.IV) == 12:
	default:
		return nil, fmt.Errorf("%w: method is %.40q with an iv of %d bytes, which this KEK does not unwrap: %s has 12, and %s, for a KEK that stays in its KMS, none",
			keystore.ErrInput, w.Method, len(w.IV), methodA256GCMKW, methodCopilot)
	}
	key, _, err := r.key(ctx, k, w.Version)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	aead, err := newGCM(key)
	if err != nil {
		return nil, err
	}
	return open(aead, slices.Concat(w.IV, w.Key), additionalData(k.ID, w.Version))
}

func (r *keyring) unwrapInside(ctx context.Context, k kek, version int, wrapped []byte) ([]byte, error) {
	wrapper, ok := k.backend.(kms.Wrapper)
	if !ok {
		return nil, fmt.Errorf("%s neither gives keys out nor wraps", k.Backend)
	}
	if err := r.store.CheckUse(k.KEK, version); err != nil {
		return nil, err
	}
	var e envelope
	if json.Unmarshal(wrapped, &e) != nil {
		return nil, kms.ErrUnwrap
	}
	var inner []byte
	err := r.call(ctx, k, "unwrap", func(ctx context.Context) (err error) {
		inner, err = wrapper.Unwrap(ctx, k.path, version, e.Key)
		return err
	})
	if err != nil {
		return nil, err
	}
	defer clear(inner)
	if len(inner) != kms.MaxPlaintext {
		return nil, kms.ErrUnwrap
	}
	aead, err := newGCM(inner)
	if err != nil {
		return nil, err
	}
	return open(aead, e.Sealed, place(k.ID, version))
}

// additionalData is what pilot's annotation binds a key to: their canonical
// JSON (RFC 8785).
func additionalData(id string, version int) []byte {
	b, err := json.Marshal(struct {
		KEKID      string `json:"kekId"`
		KEKVersion int    `json:"kekVersion"`
		Method     string `json:"method"`
	}{id, version, methodA256GCMKW})
	if err != nil {
		panic(err) // strings and an int
	}
	return b
}

// place is what a key that is wrapped inside a KMS is bound to.
func place(id string, version int) []byte {
	return fmt.Appendf(nil, "kek %d %s", version, id)
}

// newGCM returns the cipher of a key that can wrap.
func newGCM(key []byte) (cipher.AEAD, error) {
	if len(key) != keystore.KeySize {
		return nil, fmt.Errorf("%w: the KEK has %d bytes, and only one of %d bytes wraps here", keystore.ErrInput, len(key), keystore.KeySize)
	}
	return keystore.NewGCM(key)
}

// open undoes [keystore.Seal].
func open(aead cipher.AEAD, sealed, additional []byte) ([]byte, error) {
	plaintext, err := keystore.Unseal(aead, sealed, additional)
	if err != nil {
		return nil, kms.ErrUnwrap
	}
	return plaintext, nil
}

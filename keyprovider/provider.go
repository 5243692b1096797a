// Package keyprovider wraps and unwraps layer keys with AES-256-GCM under key
// encryption keys (KEKs) that it gets from a key broker.
//
// A [Provider] is pilot's key provider. A [Service] serves it to other programs, in
// ocicrypt's key provider protocol, as a gRPC service and as an executable. That is how
// skopeo, buildah, podman, containerd, CRI-O, imgcrypt and nerdctl reach it.
//
// The protocol is described at
// https://github.com/containers/ocicrypt/blob/main/docs/keyprovider.md.
package keyprovider

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/errline"
	"github.com/ctrlplane/pilot/internal/layerbudget"
	"github.com/ctrlplane/pilot/internal/openedby"
	"github.com/ctrlplane/pilot/internal/publickek"
	"github.com/ctrlplane/pilot/internal/wireformat"
	"github.com/ctrlplane/pilot/keyprovider/agekey"
	"github.com/ctrlplane/pilot/processor"
)

// ErrInput is the error of a request that no broker could serve: it is not
// the protocol's JSON, names no KEK, or has an annotation that is not pilot's.
var ErrInput = errors.New("bad request")

// ErrWrongKEK is the error of a layer key that the KEKs at hand do not unwrap.
var ErrWrongKEK = errors.New("layer key not unwrapped")

// ErrTooManyKeys is the error of a layer that is wrapped with so many KEKs that the
// broker was not asked about all of them.
var ErrTooManyKeys = fmt.Errorf("the layer names too many KEKs: the broker is asked %d times for one layer at most, and no KEK in memory unwraps it", layerbudget.Calls)

// requestTimeout bounds a request, since ocicrypt's callers set no deadline.
const requestTimeout = 30 * time.Second

// Config says how a [Provider] works.
type Config struct {
	// Name is what errors call the key provider: its name in ocicrypt.conf.
	// Default: pilot.
	Name string
	// Format is how wrapped keys are written. Default: FormatA256GCMKW.
	Format Format
	// DefaultKEKs are tried in order on an annotation that does not name
	// its KEK, when the caller names none either.
	DefaultKEKs []string
	// CacheTTL is how long a KEK is kept after it was fetched; 0: no limit.
	CacheTTL time.Duration
	// CacheGrace is how much longer it is used, and kept, as long as the
	// broker gives no usable answer; 0: no longer.
	CacheGrace time.Duration
	// CacheIdle is how long a KEK is kept after its last use; 0: no limit.
	CacheIdle time.Duration
	// CacheSize is how many KEKs are kept at most; 0: none.
	CacheSize int
	// PublicKey returns the public half of a KEK to wrap for, without asking the broker,
	// or nil if there is no file of one. May be nil.
	PublicKey func(id string) (*publickek.PublicKey, error)
	// KBSKEKs are the KEKs behind the URIs of Confidential Containers, which are canonical.
	KBSKEKs map[string]KBSKEK
	// AgeIdentities are files of identities that unwrap what was wrapped for recipients
	// of age, in the form of age-keygen. They are read each time.
	AgeIdentities []string
	// Metrics count what the Provider does. May be nil.
	Metrics *Metrics
}

// Broker is a key broker. It is safe for concurrent use, and gives up when ctx is done.
// Its errors are those of package client. A [client.Client] is one.
type Broker interface {
	// KEK returns a version of a KEK, or the current one if version is 0. The caller
	// clears its key. The error wraps [client.ErrNotExported] if the broker keeps the
	// KEK to itself.
	KEK(ctx context.Context, id string, version int) (client.KEK, error)
	// Wrap wraps a layer key with the current version of a KEK.
	Wrap(ctx context.Context, id string, layerKey []byte) (client.Wrapped, error)
	// WrapCoCo is Wrap in the form of Confidential Containers, A256GCM.
	WrapCoCo(ctx context.Context, id string, layerKey []byte) (client.Wrapped, error)
	// Unwrap unwraps a layer key, which the caller clears. The error wraps
	// [client.ErrRejected] if it was not wrapped with that KEK.
	Unwrap(ctx context.Context, id string, w client.Wrapped) (layerKey []byte, err error)
}

// Provider wraps and unwraps layer keys. It is a [processor.KeyProvider], safe for
// concurrent use.
type Provider struct {
	conf    Config
	broker  Broker
	keks    cache
	metrics *Metrics
}

// New returns a Provider that gets its KEKs from broker. Without one, which is nil, it
// wraps for public keys, and wraps and unwraps for recipients of age.
func New(broker Broker, conf Config) *Provider {
	conf.Name = cmp.Or(conf.Name, defaultName)
	conf.Format = cmp.Or(conf.Format, FormatA256GCMKW)
	if broker == nil {
		broker = noBroker{}
	}
	for _, name := range conf.AgeIdentities {
		// What can't be read is an error where it is needed.
		if exposed, _ := agekey.CheckIdentities(name); exposed != nil {
			logrus.WithError(exposed).Warn("age identities not protected")
		}
	}
	p := &Provider{conf: conf, broker: broker, metrics: conf.Metrics}
	if p.metrics == nil {
		p.metrics = NewMetrics(nil)
	}
	p.keks = cache{
		fetch:   p.fetch,
		metrics: p.metrics,
		ttl:     conf.CacheTTL,
		grace:   conf.CacheGrace,
		idle:    conf.CacheIdle,
		size:    conf.CacheSize,
		now:     time.Now,
	}
	return p
}

func (p *Provider) fetch(ctx context.Context, id string, version int) (kek client.KEK, err error) {
	defer func(start time.Time) { p.metrics.asked(ctx, "kek", start, err) }(time.Now())
	return p.broker.KEK(ctx, id, version)
}

// errNoKEK is the error of a request to wrap for nobody.
var errNoKEK = errors.New("no KEK is named")

// WrapKey wraps a layer key for each KEK that params name; those of
// `--recipient provider:pilot:team-a` name team-a. The broker is asked which version of a
// KEK is current, even if the KEK is in memory. The annotation has at most 1 MiB. WrapKey
// takes 30 seconds at most. The error wraps [ErrInput] if the request makes no sense, and
// [processor.ErrDenied] if the broker refuses a KEK.
func (p *Provider) WrapKey(ctx context.Context, params [][]byte, layerKey []byte) (_ []byte, err error) {
	defer func(start time.Time) { p.metrics.request(ctx, opWrap, start, err) }(time.Now())
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if len(layerKey) == 0 {
		return nil, fmt.Errorf("%w: the layer key is empty", ErrInput)
	}
	ids, err := namedKEKs(params)
	if err != nil {
		return nil, err
	}
	if len(ids) == 0 {
		return nil, fmt.Errorf("%w: %w: use the recipient provider:%s:KEK", ErrInput, errNoKEK, p.conf.Name)
	}
	if p.conf.Format == FormatOriginal {
		if err := refuseOriginal(); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrInput, err)
		}
		if len(ids) > 1 {
			return nil, fmt.Errorf("%w: the original's format holds one KEK, and %d are named", ErrInput, len(ids))
		}
	}

	annotations := make([]wireformat.Annotation, len(ids))
	for i, id := range ids {
		start := time.Now()
		a, version, err := p.wrap(ctx, id, layerKey)
		if err != nil {
			if denies(err) {
				err = denied{err}
			}
			return nil, err
		}
		annotations[i] = a
		p.done(ctx, opWrap, agekey.Shown(id), version, a.Method, start)
	}
	var b []byte
	if len(annotations) == 1 {
		b, err = json.Marshal(annotations[0])
	} else {
		b, err = json.Marshal(annotations)
	}
	if err != nil {
		return nil, err
	}
	if len(b) > wireformat.MaxAnnotation {
		return nil, fmt.Errorf("%w: wrapped for all these KEKs, the layer key would have more than %d bytes: name fewer", ErrInput, wireformat.MaxAnnotation)
	}
	return b, nil
}

// UnwrapKey returns the layer key that an annotation holds, pilot's or that of
// Confidential Containers, which the caller clears. The annotation says which KEK it
// takes; if params name KEKs too, only those are used. KEKs in memory are tried first.
// The broker is asked at most 128 times for one layer, or for the annotation if ctx is
// not that of a layer. UnwrapKey takes 30 seconds at most.
//
// The error wraps [ErrInput], [ErrWrongKEK], [ErrTooManyKeys] or that of the broker, and
// [processor.ErrDenied] if the broker refused all KEKs.
func (p *Provider) UnwrapKey(ctx context.Context, params [][]byte, annotation []byte) (_ []byte, err error) {
	defer func(start time.Time) { p.metrics.request(ctx, opUnwrap, start, err) }(time.Now())
	ctx = layerbudget.With(ctx)
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	annotations, err := wireformat.ParseAnnotation(annotation)
	isCoCo := err != nil && wireformat.IsCoCoPacket(annotation)
	if err != nil && !isCoCo {
		return nil, fmt.Errorf("%w: %w", ErrInput, err)
	}
	allowed, err := namedKEKs(params)
	if err != nil {
		return nil, err
	}
	if isCoCo {
		return p.unwrapCoCo(ctx, annotation, allowed)
	}

	cached := func(a wireformat.Annotation) bool {
		return (a.Method == wireformat.MethodA256GCMKW || a.Method == wireformat.MethodHPKE) && a.KEKVersion != 0 && p.keks.has(a.KEKID, a.KEKVersion)
	}
	slices.SortStableFunc(annotations, func(a, b wireformat.Annotation) int {
		switch inMemory := cached(a); {
		case inMemory == cached(b):
			return 0
		case inMemory:
			return -1
		}
		return 1
	})

	var errs []error
	for _, a := range annotations {
		start := time.Now()
		layerKey, kek, err := p.unwrap(ctx, a, allowed)
		if err != nil {
			errs = append(errs, err)
			if ctx.Err() != nil || errors.Is(err, ErrTooManyKeys) {
				break
			}
			continue
		}
		p.done(ctx, opUnwrap, kek.ID, kek.Version, a.Method, start)
		if a.Method != wireformat.MethodAge { // whose recipient is no KEK, and not proven
			openedby.Report(ctx, openedby.KEK{ID: kek.ID, Version: kek.Version, Method: a.Method})
		}
		return layerKey, nil
	}
	err = errline.Join(errs...)
	if !slices.ContainsFunc(errs, func(err error) bool { return !denies(err) }) {
		err = denied{err}
	}
	return nil, err
}

// denies reports whether the broker refused a KEK, or has none of that name.
func denies(err error) bool {
	return errors.Is(err, client.ErrForbidden) || errors.Is(err, client.ErrNotFound)
}

// denied is an error of the broker's that wraps [processor.ErrDenied] besides.
type denied struct{ error }

func (d denied) Unwrap() []error { return []error{d.error, processor.ErrDenied} }

// namedKEKs returns the KEK ids among the parameters of a recipient or key.
func namedKEKs(params [][]byte) ([]string, error) {
	if n := len(params); n > wireformat.MaxRecipients {
		return nil, fmt.Errorf("%w: %d KEKs are named, at most %d can be", ErrInput, n, wireformat.MaxRecipients)
	}
	var ids []string
	for _, b := range params {
		id := string(b)
		// ocicrypt passes this for a recipient without a parameter.
		if id == "" || id == "Enabled" {
			continue
		}
		if err := checkNamed(id); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrInput, err)
		}
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// checkNamed returns an error of what can't be the id of a KEK, without quoting a private
// key.
func checkNamed(id string) error {
	if wireformat.IsSecretKey(id) {
		return errors.New("a private key of age is named as a recipient: replace it, since others may have seen it; recipients begin with age1, and identities are in files that age-identities names")
	}
	return wireformat.ValidateKEKID(id)
}

// sweepInterval is how often expired KEKs are dropped from memory.
const sweepInterval = time.Minute

// Sweep drops expired KEKs from memory every minute until ctx is done, and then all.
func (p *Provider) Sweep(ctx context.Context) {
	tick := time.NewTicker(sweepInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			p.keks.sweep()
		case <-ctx.Done():
			p.keks.clear()
			return
		}
	}
}

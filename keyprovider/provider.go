// Package keyprovider wraps and unwraps layer keys with AES-256-GCM under key
// encryption keys (KEKs) that it gets from a key broker, and answers ocicrypt's
// key provider protocol, as a gRPC service and as an executable. That is how
// skopeo, buildah, podman, containerd, CRI-O, imgcrypt and nerdctl reach it.
//
// The protocol is described at
// https://github.com/containers/ocicrypt/blob/main/docs/keyprovider.md.
package keyprovider

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	ocicrypt "github.com/containers/ocicrypt/keywrap/keyprovider"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/errline"
	"github.com/ctrlplane/pilot/internal/keyjson"
	"github.com/ctrlplane/pilot/internal/layerbudget"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// ErrInput is the error of a request that no broker could serve: it is not
// the protocol's JSON, names no KEK, or holds an annotation that is not pilot's.
var ErrInput = errors.New("bad request")

// ErrWrongKEK is the error of a layer key that the KEKs at hand do not unwrap.
var ErrWrongKEK = errors.New("layer key not unwrapped")

// ErrTooManyKeys is the error of a layer that is wrapped with so many KEKs that the
// broker was not asked about all of them.
var ErrTooManyKeys = fmt.Errorf("the layer names too many KEKs: the broker is asked %d times for one layer at most, and no KEK in memory unwraps it", layerbudget.Calls)

// answerWithin bounds the time that a request takes, since ocicrypt's callers
// set no deadline of their own.
const answerWithin = 30 * time.Second

// Config says how a [Provider] works.
type Config struct {
	// Names are the key provider's in ocicrypt.conf, under which ocicrypt
	// passes its parameters. Default: pilot.
	Names []string
	// Format is how wrapped keys are written. Default: FormatA256GCMKW.
	Format Format
	// DefaultKEKs are tried in order on an annotation that does not name
	// its KEK, when the caller names none either.
	DefaultKEKs []string
	// CacheTTL is how long a KEK is kept after it was fetched; 0: for ever.
	CacheTTL time.Duration
	// CacheGrace is how much longer it is used, and kept, as long as the
	// broker gives no usable answer; 0: no longer.
	CacheGrace time.Duration
	// CacheIdle is how long a KEK is kept after its last use; 0: for ever.
	CacheIdle time.Duration
	// CacheSize is how many KEKs are kept at most; 0: none.
	CacheSize int
	// Metrics are told what the Provider does. May be nil.
	Metrics *Metrics
}

// Provider wraps and unwraps layer keys. It is safe for concurrent use.
type Provider struct {
	conf    Config
	broker  *client.Client
	keks    cache
	metrics *Metrics
}

// New returns a Provider that gets its KEKs from broker.
func New(broker *client.Client, conf Config) *Provider {
	if len(conf.Names) == 0 {
		conf.Names = []string{"pilot"}
	}
	if conf.Format == "" {
		conf.Format = FormatA256GCMKW
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

// WrapKey answers a keywrap request of the key provider protocol, given and
// answered in its JSON. It wraps for each KEK that the recipient's parameters
// name; those of `--recipient provider:pilot:team-a` name team-a. The broker is
// asked which version of a KEK is current, even if the KEK is in memory. It takes
// 30 seconds at most.
func (p *Provider) WrapKey(ctx context.Context, input []byte) (_ []byte, err error) {
	defer func(start time.Time) { p.metrics.request(ctx, "wrap", start, err) }(time.Now())
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	in, err := decodeInput(input, ocicrypt.OpKeyWrap)
	if err != nil {
		return nil, err
	}
	defer clear(in.KeyWrapParams.OptsData)
	if in.KeyWrapParams.Ec == nil || len(in.KeyWrapParams.OptsData) == 0 {
		return nil, fmt.Errorf("%w: keywrapparams lack ec or optsdata", ErrInput)
	}
	ids, err := p.parameters(in.KeyWrapParams.Ec.Parameters)
	if err != nil {
		return nil, err
	}
	if len(ids) == 0 {
		return nil, fmt.Errorf("%w: no KEK is named: use the recipient provider:%s:KEK%s", ErrInput, p.conf.Names[0], p.otherNames(in.KeyWrapParams.Ec.Parameters))
	}
	if len(ids) > 1 && p.conf.Format == FormatOriginal {
		return nil, fmt.Errorf("%w: the original's format holds one KEK, and %d are named", ErrInput, len(ids))
	}

	annotations := make([]wireformat.Annotation, len(ids))
	for i, id := range ids {
		start := time.Now()
		a, version, err := p.wrap(ctx, id, in.KeyWrapParams.OptsData)
		if err != nil {
			return nil, err
		}
		annotations[i] = a
		done(ctx, "layer key wrapped", id, version, a.Method, start)
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
	return json.Marshal(ocicrypt.KeyProviderKeyWrapProtocolOutput{
		KeyWrapResults: ocicrypt.KeyWrapResults{Annotation: b},
	})
}

// UnwrapKey answers a keyunwrap request of the key provider protocol. The
// annotation says which KEK it takes; if the caller names KEKs too, only those
// are used. KEKs in memory are tried first. The broker is asked a bounded number of
// times for one layer: if ctx is not that of a layer, for the annotation. It takes 30
// seconds at most.
func (p *Provider) UnwrapKey(ctx context.Context, input []byte) (_ []byte, err error) {
	defer func(start time.Time) { p.metrics.request(ctx, "unwrap", start, err) }(time.Now())
	ctx = layerbudget.With(ctx)
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	in, err := decodeInput(input, ocicrypt.OpKeyUnwrap)
	if err != nil {
		return nil, err
	}
	annotations, err := wireformat.ParseAnnotation(in.KeyUnwrapParams.Annotation)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInput, err)
	}
	var allowed []string
	if in.KeyUnwrapParams.Dc != nil {
		if allowed, err = p.parameters(in.KeyUnwrapParams.Dc.Parameters); err != nil {
			return nil, err
		}
	}

	cached := func(a wireformat.Annotation) bool {
		return a.Method == wireformat.MethodA256GCMKW && a.KEKVersion != 0 && p.keks.has(a.KEKID, a.KEKVersion)
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
		optsdata, kek, err := p.unwrap(ctx, a, allowed)
		if err != nil {
			errs = append(errs, err)
			if ctx.Err() != nil || errors.Is(err, ErrTooManyKeys) {
				break
			}
			continue
		}
		defer clear(optsdata)
		done(ctx, "layer key unwrapped", kek.ID, kek.Version, a.Method, start)
		results := keyjson.Object(keyjson.Key("optsdata", optsdata))
		defer clear(results)
		return keyjson.Object(keyjson.Value("keywrapresults", ocicrypt.KeyWrapResults{}), keyjson.Raw("keyunwrapresults", results)), nil
	}
	return nil, errline.Join(errs...)
}

// notProviders are ocicrypt's parameters that are for no key provider.
var notProviders = []string{"pubkeys", "x509s", "gpg-recipients", "gpg-pubkeyringfile", "pkcs11-pubkeys", "pkcs11-yamls", "pkcs11-config"}

// otherNames says what to do if the caller knows pilot by another name, if it
// seems to.
func (p *Provider) otherNames(params map[string][][]byte) string {
	for _, name := range slices.Sorted(maps.Keys(params)) {
		if !slices.Contains(p.conf.Names, name) && !slices.Contains(notProviders, name) {
			return fmt.Sprintf(", or add %.60q to provider-name if pilot has that name in ocicrypt.conf", name)
		}
	}
	return ""
}

// parameters returns the KEK ids among the parameters that ocicrypt passes. It
// passes those of all key providers, and does not say by which name it found
// this one.
func (p *Provider) parameters(params map[string][][]byte) ([]string, error) {
	var named [][]byte
	for _, name := range p.conf.Names {
		named = append(named, params[name]...)
	}
	if n := len(named); n > wireformat.MaxRecipients {
		return nil, fmt.Errorf("%w: %d KEKs are named, at most %d can be", ErrInput, n, wireformat.MaxRecipients)
	}
	var ids []string
	for _, b := range named {
		id := string(b)
		// ocicrypt passes this for a recipient without a parameter.
		if id == "" || id == "Enabled" {
			continue
		}
		if err := wireformat.ValidateKEKID(id); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrInput, err)
		}
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// sweepEvery is how often KEKs that have expired are dropped from memory.
const sweepEvery = time.Minute

// Sweep drops expired KEKs from memory, now and then, until ctx is done, and then
// all.
func (p *Provider) Sweep(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
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

func decodeInput(b []byte, want ocicrypt.KeyProviderKeyWrapProtocolOperation) (*ocicrypt.KeyProviderKeyWrapProtocolInput, error) {
	var in ocicrypt.KeyProviderKeyWrapProtocolInput
	if err := json.Unmarshal(b, &in); err != nil {
		// The error of encoding/json may quote its input, which holds keys.
		return nil, fmt.Errorf("%w: it is not the JSON of ocicrypt's key provider protocol", ErrInput)
	}
	if in.Operation != want {
		return nil, fmt.Errorf("%w: op is %.40q, not %q", ErrInput, in.Operation, want)
	}
	return &in, nil
}

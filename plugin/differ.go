// Package plugin is pilot inside containerd: a differ that decrypts the layers
// of an image while it unpacks them. containerd hands a differ the layer's
// whole descriptor, so no client has to pass anything about decryption.
//
// It runs as a proxy plugin, in a process of its own (see [NewServer]), or
// compiled into containerd (see package builtin below this one).
package plugin

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/plugins/diff/walking"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"

	"github.com/ctrlplane/pilot/internal/layerkeys"
	"github.com/ctrlplane/pilot/internal/mustencrypt"
	"github.com/ctrlplane/pilot/internal/traceid"
	"github.com/ctrlplane/pilot/processor"
)

// Config says how a [Differ] works.
type Config struct {
	// Layers is how many encrypted layers are unpacked at once at most.
	// Each takes six buffers of [processor.BufferSize] bytes, and what its
	// decompression takes. Default: 8.
	Layers int
	// UnwrapTimeout bounds the wait for a layer key. Default: 40 seconds.
	UnwrapTimeout time.Duration
	// DecryptionKeysPath is a directory of private keys to try, before those
	// that the client passes and Keys: see [processor.KeyDir]. Default: none.
	DecryptionKeysPath string
	// Keys are the key providers that unwrap layer keys, and private keys to try
	// after those that the client passes. Default: none.
	Keys processor.Keys
	// Metrics is what the Differ's metrics are registered with. May be nil.
	Metrics prometheus.Registerer
	// Record is where the Differ notes which keys have opened a layer with which diff ID.
	// A layer that can't be recorded is not unpacked. May be nil.
	Record *layerkeys.Record
	// Rules returns those of the setting must-be-encrypted. May be nil: none.
	Rules func() mustencrypt.Rules
}

const (
	defaultLayers        = 8
	defaultUnwrapTimeout = 40 * time.Second
)

// Differ applies layers, decrypting those that are encrypted, and compares
// snapshots. It is safe for concurrent use.
type Differ struct {
	diff.Comparer
	store     content.Store
	appliers  []diff.Applier // the first that can deal with a snapshot's mounts does
	conf      Config
	keys      *processor.KeyDir
	manifests *manifestSearch
	places    chan struct{}
	metrics   *metrics
}

// New returns a Differ that reads layers from store. mounts may be nil.
func New(store content.Store, mounts mount.Manager, conf Config) *Differ {
	if conf.Layers <= 0 {
		conf.Layers = defaultLayers
	}
	if conf.UnwrapTimeout <= 0 {
		conf.UnwrapTimeout = defaultUnwrapTimeout
	}
	// containerd asks the handler first that was registered last, and the
	// stream processors of its configuration are registered before plugins
	// are made.
	registerDecryption()
	return &Differ{
		Comparer: walking.NewWalkingDiff(store),
		store:    store,
		appliers: []diff.Applier{
			newErofsApplier(store),
			apply.NewFileSystemApplierWithMountManager(store, mounts),
		},
		conf:      conf,
		keys:      newKeyDir(conf.DecryptionKeysPath, conf.Metrics),
		manifests: &manifestSearch{store: store},
		places:    make(chan struct{}, conf.Layers),
		metrics:   newMetrics(conf.Metrics),
	}
}

// Apply unpacks the layer that desc describes onto mounts, as containerd's own
// appliers do, decrypting it first if it is encrypted. The error of a layer
// that can't be decrypted names the layer and is one of containerd's errdefs:
// ErrFailedPrecondition if no key unwraps it, ErrUnavailable if a key provider
// did not answer in time, ErrDataLoss if it was changed, ErrInvalidArgument if
// what its descriptor says makes no sense.
func (d *Differ) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts ...diff.ApplyOpt) (_ ocispec.Descriptor, err error) {
	end := d.metrics.begin(desc)
	err = errPanic // unless it returns
	defer func() { end(ctx, d.size(ctx, desc, err), err) }()
	trace.SpanFromContext(ctx).SetAttributes(
		attribute.String("pilot.layer.digest", desc.Digest.String()), attribute.String("pilot.layer.media_type", desc.MediaType))
	if !processor.IsEncrypted(desc.MediaType) {
		if _, err := images.DiffCompression(ctx, desc.MediaType); err != nil && !strings.Contains(desc.MediaType, ".erofs.") {
			// It may be for a stream processor of containerd's.
			return ocispec.Descriptor{}, fmt.Errorf("pilot: media type %s: %w", desc.MediaType, errdefs.ErrNotImplemented)
		}
		if err := d.mayBePlain(ctx, desc); err != nil {
			return ocispec.Descriptor{}, &failure{desc.Digest, traceid.Of(ctx), err}
		}
		applied, err := d.apply(ctx, desc, mounts, opts...)
		if err == nil && d.conf.Record != nil {
			d.conf.Record.AddPlain(desc.Digest, applied.Digest)
		}
		return applied, err
	}
	applied, err := d.decrypt(ctx, desc, mounts, opts...)
	if err != nil {
		return ocispec.Descriptor{}, &failure{desc.Digest, traceid.Of(ctx), err}
	}
	return applied, nil
}

// size returns the size in bytes of the blob of a layer that was unpacked. The size in
// the descriptor was not checked by anybody: it may be negative.
func (d *Differ) size(ctx context.Context, desc ocispec.Descriptor, err error) int64 {
	if err != nil {
		return 0
	}
	info, err := d.store.Info(ctx, desc.Digest)
	if err != nil {
		return 0 // removed meanwhile
	}
	return info.Size
}

var errPanic = errors.New("panic")

// failure is an error as it can go over gRPC, several times on its way to the client. It
// wraps only one of containerd's errors: gRPC would repeat the text of every wrapped
// error on the client.
type failure struct {
	layer digest.Digest
	trace string // the ID in pilot's log and in copilot's audit log, or ""
	err   error
}

func (f *failure) Error() string {
	text := fmt.Sprintf("pilot: layer %s: %s", f.layer, f.err)
	if f.trace != "" {
		text += " (trace " + f.trace + ")"
	}
	return text
}

func (f *failure) Unwrap() error {
	switch err := f.err; {
	case errors.Is(err, context.Canceled):
		return context.Canceled
	case errors.Is(err, processor.ErrTampered):
		return errdefs.ErrDataLoss
	case errors.Is(err, context.DeadlineExceeded):
		return errdefs.ErrUnavailable
	case errors.Is(err, processor.ErrNoKey):
		return errdefs.ErrFailedPrecondition
	case errors.Is(err, errUnwrap):
		return errdefs.ErrInvalidArgument
	default:
		return errdefs.Resolve(err)
	}
}

// errUnwrap is the error of a layer whose descriptor makes no sense.
var errUnwrap = errors.New("layer key")

func (d *Differ) decrypt(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts ...diff.ApplyOpt) (ocispec.Descriptor, error) {
	key, err := d.unwrap(ctx, desc, opts)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer key.Clear()
	isAsWrapped, err := d.isForRules(ctx, desc, key)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	// Only now, so that layers that wait for a broker hold up no others.
	if err := d.enter(ctx); err != nil {
		return ocispec.Descriptor{}, err
	}
	defer d.leave()
	var applied ocispec.Descriptor
	var plain digest.Digest
	if len(mounts) > 0 && isErofs(desc.MediaType) {
		applied, plain, err = d.applyErofs(ctx, desc, key, mounts, opts...)
	} else {
		applied, plain, err = d.applyDecrypted(ctx, desc, key, mounts, opts...)
	}
	if err == nil {
		err = isAsWrapped(plain, applied.Digest)
	}
	if err == nil {
		err = d.record(desc, key, applied, plain)
	}
	return applied, err
}

// applyDecrypted decrypts a layer while the appliers unpack it. plain is the digest of the
// plain blob, if there is any rule which images must be encrypted, and else "": it costs as
// much as the HMAC.
func (d *Differ) applyDecrypted(ctx context.Context, desc ocispec.Descriptor, key *processor.LayerKey, mounts []mount.Mount, opts ...diff.ApplyOpt) (applied ocispec.Descriptor, plain digest.Digest, err error) {
	layer := &decryption{key: key, hash: len(d.rules()) > 0 && isCompressed(ctx, desc.MediaType)}
	applied, err = d.apply(context.WithValue(ctx, decryptionKey{}, layer), desc, mounts, opts...)
	layer.end()
	if err == nil {
		err = ctx.Err()
	}
	if ctx.Err() == nil && !layer.verified() {
		// The applier stopped before EOF: tampered data confused it, or the
		// archive ended early.
		if verdict := d.verify(ctx, desc, key); verdict != nil && (err == nil || errors.Is(verdict, processor.ErrTampered)) {
			err = verdict
		}
	}
	if errors.Is(err, processor.ErrTampered) {
		err = processor.ErrTampered // hide follow-up errors
	}
	return applied, layer.plainDigest(), err
}

// isCompressed reports whether an encrypted layer may be compressed. If not, its digest is
// the one that containerd computes of what it unpacks.
func isCompressed(ctx context.Context, mediaType string) bool {
	plain, _ := processor.PlainMediaType(mediaType)
	compression, err := images.DiffCompression(ctx, plain)
	return err != nil || compression != ""
}

// enter waits until fewer than Config.Layers layers are read. The caller calls
// leave.
func (d *Differ) enter(ctx context.Context) error {
	select {
	case d.places <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (d *Differ) leave() { <-d.places }

// apply unpacks with the first applier that can.
func (d *Differ) apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts ...diff.ApplyOpt) (applied ocispec.Descriptor, err error) {
	if len(mounts) == 0 {
		// Which those below do not expect.
		return ocispec.Descriptor{}, fmt.Errorf("no mounts to unpack onto: %w", errdefs.ErrInvalidArgument)
	}
	for _, a := range d.appliers {
		if applied, err = a.Apply(ctx, desc, mounts, opts...); !errdefs.IsNotImplemented(err) {
			return applied, err
		}
	}
	return applied, err
}

// unwrap gets the layer's key, from those that the client passed, as clients
// of the stream processors do, those of the node, and the key providers.
func (d *Differ) unwrap(ctx context.Context, desc ocispec.Descriptor, opts []diff.ApplyOpt) (*processor.LayerKey, error) {
	var passed diff.ApplyConfig
	for _, o := range opts {
		if err := o(ctx, desc, &passed); err != nil {
			return nil, err
		}
	}
	keys := d.conf.Keys
	for _, payload := range passed.ProcessorPayloads {
		// It may be for another stream processor.
		if p, err := processor.ParsePayload(payload.GetTypeUrl(), payload.GetValue()); err == nil {
			keys = keys.With(&p.DecryptConfig)
			break // imgcrypt passes the same for each media type
		}
	}
	return d.layerKey(ctx, keys, desc)
}

// verify reads the whole layer for its HMAC.
func (d *Differ) verify(ctx context.Context, desc ocispec.Descriptor, key *processor.LayerKey) error {
	ra, err := d.store.ReaderAt(ctx, desc)
	if err != nil {
		return err
	}
	defer ra.Close()
	return processor.Verify(content.NewReader(ra), key)
}

// Package plugin is pilot inside containerd: a differ that decrypts the layers
// of an image while it unpacks them. containerd hands a differ the layer's
// whole descriptor, so no client has to pass anything about decryption.
package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/plugins/diff/walking"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/containers/ocicrypt/config"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// Config says how a [Differ] works.
type Config struct {
	// Layers is how many encrypted layers are unpacked at once at most.
	// Each takes two buffers of [processor.BufferSize] bytes.
	Layers int
	// UnwrapTimeout bounds the wait for a layer key.
	UnwrapTimeout time.Duration
	// Keys are private keys to try, besides the key providers. May be nil.
	Keys *config.DecryptConfig
}

// Differ applies layers, decrypting those that are encrypted, and compares
// snapshots. It is safe for concurrent use.
type Differ struct {
	diff.Comparer
	applier diff.Applier
	conf    Config
	places  chan struct{}
}

// New returns a Differ that reads layers from store. mounts may be nil.
func New(store content.Store, mounts mount.Manager, conf Config) *Differ {
	return &Differ{
		Comparer: walking.NewWalkingDiff(store),
		applier:  apply.NewFileSystemApplierWithMountManager(store, mounts),
		conf:     conf,
		places:   make(chan struct{}, conf.Layers),
	}
}

// Apply unpacks the layer that desc describes onto mounts, as containerd's own
// applier does, decrypting it first if it is encrypted. The error of a layer
// that can't be decrypted names the layer and is one of containerd's errdefs.
func (d *Differ) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts ...diff.ApplyOpt) (ocispec.Descriptor, error) {
	if !processor.IsEncrypted(desc.MediaType) {
		return d.applier.Apply(ctx, desc, mounts, opts...)
	}
	select {
	case d.places <- struct{}{}:
		defer func() { <-d.places }()
	case <-ctx.Done():
		return ocispec.Descriptor{}, ctx.Err()
	}

	key, err := d.unwrap(ctx, desc)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("pilot: layer %s: %w", desc.Digest, err)
	}
	defer key.Clear()
	applied, err := d.applier.Apply(context.WithValue(ctx, layerKey{}, key), desc, mounts, opts...)
	if errors.Is(err, processor.ErrTampered) {
		err = fmt.Errorf("pilot: layer %s: %w: %w", desc.Digest, errdefs.ErrDataLoss, err)
	}
	return applied, err
}

// unwrap gets the layer's key, from those that the client passed, as clients
// of the stream processors do, those of the node, and the key providers.
func (d *Differ) unwrap(ctx context.Context, desc ocispec.Descriptor) (*processor.LayerKey, error) {
	ctx, cancel := context.WithTimeout(ctx, d.conf.UnwrapTimeout)
	defer cancel()
	dc := d.conf.Keys
	if dc == nil {
		dc = &config.DecryptConfig{}
	}
	key, err := processor.Unwrap(ctx, dc, desc)
	switch {
	case err == nil:
		return key, nil
	case errors.Is(err, context.DeadlineExceeded):
		return nil, fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
	case errors.Is(err, processor.ErrNoKey):
		return nil, fmt.Errorf("%w: %w", errdefs.ErrFailedPrecondition, err)
	}
	return nil, fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
}

// layerKey is the context key under which Apply hands the layer's key to the
// stream processor that containerd's applier makes.
type layerKey struct{}

func init() {
	diff.RegisterProcessor(func(ctx context.Context, mediaType string) (diff.StreamProcessorInit, bool) {
		_, ok := ctx.Value(layerKey{}).(*processor.LayerKey)
		return newDecryption, ok && processor.IsEncrypted(mediaType)
	})
}

// decryption is a stream processor in this process.
type decryption struct {
	*processor.Decrypter
	mediaType string
}

func newDecryption(ctx context.Context, stream diff.StreamProcessor, _ map[string]typeurl.Any) (diff.StreamProcessor, error) {
	d, err := processor.NewDecrypter(stream, ctx.Value(layerKey{}).(*processor.LayerKey))
	if err != nil {
		return nil, err
	}
	mediaType, _ := processor.PlainMediaType(stream.MediaType())
	return &decryption{d, mediaType}, nil
}

func (d *decryption) MediaType() string { return d.mediaType }

func (d *decryption) Close() error { return nil }

// Err is what containerd's applier asks once it has unpacked everything. What
// unpacks may stop before the end of the stream, but the verdict is there.
func (d *decryption) Err() error {
	_, err := d.WriteTo(io.Discard)
	return err
}

// Package image encrypts and decrypts the layers of a container image in a content
// store, through its indexes and manifests, and wraps its layer keys for other
// recipients.
//
// Whatever does not have to change stays as it is, byte for byte, so decrypting an
// encrypted image gives back the same image, digest for digest.
//
// A [Store] is containerd's, or one in a directory: see package plugins/content/local of
// containerd. In a containerd that runs, the caller must hold a lease: without one,
// containerd may collect what was written before an image refers to it.
package image

import (
	"context"
	"fmt"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// maxConcurrentLayers is how many layers are encrypted or decrypted at once.
const maxConcurrentLayers = 4

// Options select layers and report progress. The zero value selects all layers.
type Options struct {
	// Layers are indexes into the layers of each manifest, from 0, or from
	// -1 downwards to count from the topmost.
	Layers []int
	// Base are the layers of the image that this one was built on. [Encrypt],
	// [Decrypt] and [Rewrap] leave them as they are.
	Base []ocispec.Descriptor
	// Platforms are the platforms to work on; none means all.
	Platforms []ocispec.Platform
	// KeysFrom are layers of other images. Where [Encrypt] finds a layer that
	// is encrypted and has no key annotations, as in an image that BuildKit
	// built on an encrypted one, it takes those of the same layer here.
	KeysFrom []ocispec.Descriptor
	// Like is an earlier encrypted image, of which [Encrypt] takes over the layers
	// that are encrypted forms of the same plain ones. May be nil.
	Like *Like
	// Attestations says what [Encrypt] does with attestations.
	Attestations Attestations
	// KeepAbsent has [Encrypt] keep manifests and indexes that are not in the
	// store, as they are. By default they are left out of the new index.
	KeepAbsent bool
	// AllowPlain has [Encrypt] accept everything that stays readable.
	AllowPlain bool
	// Progress, if not nil, is called after each read of a layer with the number of
	// bytes. It is called from several goroutines at once.
	Progress func(layer ocispec.Descriptor, n int)
}

// Result is the outcome of [Encrypt] or [Decrypt].
type Result struct {
	// Target describes the new image. It is the one that was given if nothing
	// changed.
	Target ocispec.Descriptor
	// Layers is how many layers changed. A layer in several manifests counts once.
	Layers int
	// Skipped are the manifests that stay as they are because their
	// content is not in the store, as with platforms that were not pulled.
	Skipped []ocispec.Descriptor
	// LeftOut are the entries of indexes that [Encrypt] left out.
	LeftOut []ocispec.Descriptor
	// Plain is what [Encrypt] left readable in Target.
	Plain []Plain
	// Reused counts the layers of Options.Like that [Encrypt] took over.
	Reused Reused
	// Lazy counts the layers that [Encrypt] sealed for lazy pulling.
	Lazy int
	// NotLazy are the layers that say that they can be pulled lazily, and that [Encrypt]
	// could not seal for it.
	NotLazy []NotLazy
	// Lacking has a sentence for each selected layer that some manifest does not
	// have.
	Lacking []string
}

// Encrypt encrypts the layers of the image target for the recipients to,
// whatever their media types. Layers that are encrypted already are not touched:
// the recipients are added to theirs, for which to has to have a private key or a
// key provider that unwraps. An encrypted layer without key annotations
// is an error unless opts.KeysFrom has its key. Adding recipients reads no layer.
//
// What stays readable is in the result. It is a [*PlainError], before anything is
// written, unless opts.Layers or opts.Platforms do not select it or other options
// accept it. Manifests and other entries of an index that are not in the store are left
// out of the new index.
//
// The keys are wrapped for all recipients, and the manifests made, before the first
// layer is read, so errors of recipients and limits come first. The error wraps
// [ErrLimit] or [processor.ErrTooManyRecipients] if the result would be too large.
//
// A layer that is eStargz or zstd:chunked, and says so by the annotation
// containerd.io/snapshot/stargz/toc.digest, is sealed for lazy pulling: see [SealedLazy].
// That takes reading its end before the rest of it, which a store that reads blobs in
// order has to have a method for:
//
//	ReadRange(ctx context.Context, desc ocispec.Descriptor, p []byte, off int64) error
//
// A Docker image becomes an OCI image, since only those can have encrypted
// layers, with a note that lets [Decrypt] undo that.
func Encrypt(ctx context.Context, store Store, target ocispec.Descriptor, to processor.Recipients, opts Options) (Result, error) {
	switch opts.Attestations {
	case "", EncryptAttestations, DropAttestations, KeepAttestations:
	default:
		return Result{}, fmt.Errorf("attestations can't be treated as %q: use encrypt, drop or keep", opts.Attestations)
	}
	e := &encryption{to: to, earlier: newEarlier(opts.Like, to)}
	defer e.clear()
	result, err := e.plan(ctx, store, target, opts)
	if err == nil {
		err = refusal(result, opts)
	}
	if err != nil {
		return Result{}, err
	}
	w := newWork(store, opts, encrypting, e.layer)
	w.was = e.was
	w.diffIDs = e.diffIDs
	if result, err = w.run(ctx, target); err == nil {
		err = refusal(result, opts) // content may have gone since
	}
	if err != nil {
		return Result{}, err
	}
	result.Reused = e.earlier.result()
	result.Lazy, result.NotLazy = len(e.sealed), e.notLazy
	return result, nil
}

// Check returns an error if [Encrypt] would refuse the image for what stays readable, or can't
// wrap for the recipients to, of which it tries a key. It reads no layer, so callers can
// find out before they spend time on an image.
func Check(ctx context.Context, store Store, target ocispec.Descriptor, to processor.Recipients, opts Options) error {
	e := &encryption{to: to}
	w := newWork(store, opts, encrypting, func(_ context.Context, _ *work, desc ocispec.Descriptor) (change, error) {
		if encrypted, ok := processor.EncryptedMediaType(desc.MediaType); ok {
			desc.MediaType = encrypted
		}
		return change{desc: desc}, nil
	})
	w.dry = true
	result, err := w.run(ctx, target)
	if err == nil {
		err = refusal(result, opts)
	}
	if err != nil {
		return err
	}
	key := processor.NewLayerKey("")
	defer key.Clear()
	_, err = e.wrap(ctx, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer}, key)
	return err
}

// refusal returns an error if something is readable that the options do not accept.
func refusal(result Result, opts Options) error {
	if refused := Unaccepted(result.Plain); len(refused) > 0 && !opts.AllowPlain {
		return &PlainError{refused}
	}
	return nil
}

// Decrypt decrypts the layers of the image target with keys.
func Decrypt(ctx context.Context, store Store, target ocispec.Descriptor, keys processor.Keys, opts Options) (Result, error) {
	return newWork(store, opts, decrypting, decryption{keys}.layer).run(ctx, target)
}

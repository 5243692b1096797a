// Package image encrypts and decrypts the layers of a container image in a
// content store, an index, its manifests, and their layers, and wraps the keys
// of its layers for others.
//
// What it does not have to change stays as it is, byte for byte, so decrypting
// an image gives back the very image that was encrypted. The caller holds a
// lease, without which containerd may collect what is written before the
// image that refers to it exists.
package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// layersAtOnce is how many layers are encrypted or decrypted at once.
const layersAtOnce = 4

// Options select layers and report progress. The zero value selects all.
type Options struct {
	// Layers are indexes into the layers of each manifest, from 0, or from
	// -1 downwards to count from the topmost.
	Layers []int
	// Base are layers of the image that this one was built on. [Encrypt],
	// [Decrypt] and [Rewrap] leave those as they are.
	Base []ocispec.Descriptor
	// Platforms are those to work on.
	Platforms []ocispec.Platform
	// KeysFrom are layers of other images. Where [Encrypt] finds a layer that
	// is encrypted and has no key annotations, as in an image that BuildKit
	// built on an encrypted one, it takes those of the same layer here.
	KeysFrom []ocispec.Descriptor
	// Attestations says what [Encrypt] does with attestations.
	Attestations Attestations
	// KeepAbsent has [Encrypt] keep manifests and indexes that are not in the
	// store, as they are. By default they are left out of the new index.
	KeepAbsent bool
	// AllowPlain has [Encrypt] accept everything that stays readable.
	AllowPlain bool
	// Progress, if not nil, is told how many bytes of a layer were read,
	// each time some were. It is called from several goroutines.
	Progress func(layer ocispec.Descriptor, n int)
}

// Result is what became of an image.
type Result struct {
	// Target describes the new image; what was given if nothing changed.
	Target ocispec.Descriptor
	// Layers is how many layers were changed. A layer that several manifests
	// have counts once.
	Layers int
	// Skipped are the manifests that stay as they are because their
	// content is not in the store, as with platforms that were not pulled.
	Skipped []ocispec.Descriptor
	// LeftOut are the entries of indexes that [Encrypt] left out.
	LeftOut []ocispec.Descriptor
	// Plain is what [Encrypt] left readable in Target.
	Plain []Plain
	// Lacking says which of the selected layers some manifest does not have, a
	// sentence each.
	Lacking []string
}

// Encrypt encrypts the layers of the image target for the recipients to,
// whatever their media types. Layers that are encrypted already are not touched:
// the recipients are added to theirs, for which to has to have a private key or a
// key provider that unwraps. An encrypted layer without key annotations
// is an error unless opts.KeysFrom has its key. Adding recipients reads no layer.
//
// What stays readable is in the result. Before anything is written it is a
// [*PlainError], unless opts select layers or platforms, and it is not selected,
// or other options accept it. Manifests and other entries of an index that are not
// in the store are left out of the new index.
//
// The keys are wrapped for all recipients, and the manifests made, before the first
// layer is read, so that what can't be written is found out then. The error wraps
// [ErrLimit] or [processor.ErrTooManyRecipients] if the result would be too large.
//
// A Docker image becomes an OCI image, since only those can have encrypted
// layers, with a note that lets [Decrypt] undo that.
func Encrypt(ctx context.Context, cs content.Store, target ocispec.Descriptor, to processor.Recipients, opts Options) (Result, error) {
	switch opts.Attestations {
	case "", EncryptAttestations, DropAttestations, KeepAttestations:
	default:
		return Result{}, fmt.Errorf("attestations can't be treated as %q: use encrypt, drop or keep", opts.Attestations)
	}
	e := &encryption{to: to}
	defer e.clear()
	result, err := e.plan(ctx, cs, target, opts)
	if err == nil {
		err = refusal(result, opts)
	}
	if err != nil {
		return Result{}, err
	}
	w := newWork(cs, opts, e)
	w.was = e.was
	if result, err = w.run(ctx, target); err == nil {
		err = refusal(result, opts) // content may have gone since
	}
	if err != nil {
		return Result{}, err
	}
	return result, nil
}

// refusal returns an error if something is readable that the options do not accept.
func refusal(result Result, opts Options) error {
	if refused := Unaccepted(result.Plain); len(refused) > 0 && !opts.AllowPlain {
		return &PlainError{refused}
	}
	return nil
}

// Decrypt decrypts the layers of the image target with keys.
func Decrypt(ctx context.Context, cs content.Store, target ocispec.Descriptor, keys processor.Keys, opts Options) (Result, error) {
	return run(ctx, cs, target, opts, &decryption{keys: keys})
}

// operation is what is done to each layer: an encryption, a decryption or a
// rewrapping.
type operation interface {
	mode() mode
	// wants reports whether a layer of this media type is to be changed.
	wants(mediaType string) bool
	// layer changes a layer and says how its descriptor changes.
	layer(ctx context.Context, w *work, desc ocispec.Descriptor) (change, error)
}

// work is one image being worked on.
type work struct {
	content.Store
	Options
	op      operation
	dry     bool  // nothing is written
	was     bool  // some manifest had encrypted layers, as far as is known
	strict  bool  // a document that can be read in several ways is an error
	blobs   blobs // by op
	usage   usage
	skipped []ocispec.Descriptor
	leftOut []ocispec.Descriptor
	plain   []Plain
	// encrypted are the layers, as they are in target, of which the blob is
	// encrypted, or will be.
	encrypted []Plain
	done      map[string]*visited                  // by [visitKey]
	entries   map[digest.Digest]indexEntry         // of indexes
	renamed   map[digest.Digest]ocispec.Descriptor // what took the place of a manifest or index
	unchanged []digest.Digest                      // of manifests and indexes that stay as they are
	seen      int                                  // manifests that are here, with what is needed of them
	changed   map[string]bool                      // layers, each once however many manifests have it
	matched   map[int]bool                         // by index into Options.Platforms
	inRange   map[int]bool                         // the Layers that some manifest has
	hasBase   bool                                 // some manifest has a layer of Base
	lacking   []string
}

func run(ctx context.Context, cs content.Store, target ocispec.Descriptor, opts Options, op operation) (Result, error) {
	return newWork(cs, opts, op).run(ctx, target)
}

func newWork(cs content.Store, opts Options, op operation) *work {
	return &work{
		Store: cs, Options: opts, op: op, matched: map[int]bool{}, inRange: map[int]bool{},
		changed: map[string]bool{}, done: map[string]*visited{}, entries: map[digest.Digest]indexEntry{}, renamed: map[digest.Digest]ocispec.Descriptor{},
	}
}

func (w *work) run(ctx context.Context, target ocispec.Descriptor) (Result, error) {
	out, err := w.any(ctx, target, 0)
	if err != nil {
		return Result{}, err
	}
	if err := errors.Join(w.checkSelection(), w.checkBase()); err != nil {
		return Result{}, err
	}
	if w.seen == 0 && len(w.skipped)+len(w.leftOut) > 0 {
		return Result{}, fmt.Errorf("no layers of this image are here: %w", errdefs.ErrNotFound)
	}
	out.desc.Annotations, out.desc.URLs = target.Annotations, target.URLs
	out.desc.Platform = target.Platform
	if !out.changed { // not even by what was left out of it
		out.desc = target
	}
	w.addShared()
	return Result{Target: out.desc, Layers: len(w.changed), Skipped: w.skipped, LeftOut: w.leftOut, Plain: w.plain, Lacking: w.lacking}, nil
}

// checkSelection refuses a selection of what the image does not have.
func (w *work) checkSelection() error {
	for i, p := range w.Platforms {
		if !w.matched[i] {
			return fmt.Errorf("the image has no platform %s", platforms.FormatAll(p))
		}
	}
	for _, n := range w.Layers {
		if !w.inRange[n] {
			return fmt.Errorf("the image has no layer %d", n)
		}
	}
	return nil
}

// outcome is what became of a manifest or an index.
type outcome struct {
	desc      ocispec.Descriptor // MediaType, Digest and Size
	changed   bool
	encrypted bool // it holds encrypted layers, as far as can be seen
	was       bool // it held encrypted layers before
}

// errAbsent is the error of a manifest whose content is not in the store.
var errAbsent = errors.New("its content is not here")

// indexEntry is an entry of an index.
type indexEntry struct {
	ocispec.Descriptor
	depth int
}

// visited is a manifest or index that was worked on, or is being worked on.
type visited struct {
	outcome
	err error
}

// visitKey returns what the outcome of a manifest or index depends on: the same
// manifest may be there for several platforms, of which one is selected.
func visitKey(desc ocispec.Descriptor) string {
	platform, err := json.Marshal(desc.Platform)
	if err != nil {
		panic(err) // strings
	}
	return fmt.Sprint(desc.MediaType, desc.Digest, desc.Size, string(platform), IsAttestation(desc))
}

// any works on a manifest or an index, once however often it is there.
func (w *work) any(ctx context.Context, desc ocispec.Descriptor, depth int) (outcome, error) {
	key := visitKey(desc)
	if v := w.done[key]; v != nil {
		return v.outcome, v.err
	}
	v := &visited{outcome: outcome{desc: desc}}
	w.done[key] = v
	v.outcome, v.err = w.visitOnce(ctx, desc, depth)
	switch _, renamed := w.renamed[desc.Digest]; {
	case v.err != nil:
	case !v.changed:
		w.unchanged = append(w.unchanged, desc.Digest)
	case !renamed:
		w.renamed[desc.Digest] = v.desc
	}
	return v.outcome, v.err
}

func (w *work) visitOnce(ctx context.Context, desc ocispec.Descriptor, depth int) (outcome, error) {
	switch {
	case isIndex(desc.MediaType):
		return w.index(ctx, desc, depth)
	case isManifest(desc.MediaType):
		return w.manifest(ctx, desc, depth == 0)
	case desc.MediaType == images.MediaTypeDockerSchema1Manifest:
		return outcome{}, fmt.Errorf("%s is a Docker image of schema 1, which can't be encrypted: convert it first, as with \"skopeo copy --format oci\"", desc.Digest)
	}
	return outcome{}, fmt.Errorf("%s is no image but of type %q", desc.Digest, desc.MediaType)
}

func (w *work) manifest(ctx context.Context, desc ocispec.Descriptor, top bool) (outcome, error) {
	out := outcome{desc: desc}
	mode := w.op.mode()
	doc, err := w.document(ctx, desc)
	if errdefs.IsNotFound(err) && !top {
		if w.platform(desc.Platform) && len(w.Platforms) > 0 && !IsAttestation(desc) {
			return outcome{}, fmt.Errorf("platform %s: manifest %s is not here: %w", platforms.FormatAll(*desc.Platform), desc.Digest, errdefs.ErrNotFound)
		}
		return outcome{}, errAbsent
	}
	if err != nil {
		return outcome{}, fmt.Errorf("manifest %s: %w", desc.Digest, err)
	}
	w.addUnlike(desc, doc)
	var manifest ocispec.Manifest
	if err := json.Unmarshal(doc, &manifest); err != nil {
		return outcome{}, fmt.Errorf("manifest %s: %w", desc.Digest, err)
	}
	if err := w.usage.manifest(manifest.Layers); err != nil {
		return outcome{}, fmt.Errorf("manifest %s: %w", desc.Digest, err)
	}
	platform := w.platformOf(ctx, desc, manifest)
	selected := w.platform(platform)
	kept := mode == encrypting && w.Attestations == KeepAttestations && IsAttestation(desc)

	var chosen []int
	if selected {
		w.noteLacking(platform, manifest.Layers)
	}
	plain := make(map[int]Reason)
	for i, l := range manifest.Layers {
		reason, err := w.unencryptable(ctx, l)
		switch {
		case err != nil:
			return outcome{}, fmt.Errorf("layer %s: %w", l.Digest, err)
		case !selected || !w.layer(i, len(manifest.Layers)) || w.inBase(l):
			plain[i] = ReasonNotSelected
		case kept:
			plain[i] = ReasonAttestation
		case mode == encrypting && reason != "":
			plain[i] = reason
		case w.op.wants(l.MediaType):
			chosen = append(chosen, i)
		}
	}
	for _, i := range chosen {
		if l := manifest.Layers[i]; mode == encrypting && strangeData(l) {
			return outcome{}, fmt.Errorf("manifest %s: %w", desc.Digest, errData(l))
		}
		if !w.reads(manifest.Layers[i]) {
			continue
		}
		switch here, err := w.has(ctx, manifest.Layers[i]); {
		case err != nil:
			return outcome{}, fmt.Errorf("layer %s: %w", manifest.Layers[i].Digest, err)
		case !here && !top && (len(w.Platforms) == 0 || IsAttestation(desc)):
			return outcome{}, errAbsent
		case !here:
			return outcome{}, fmt.Errorf("layer %s%s is not here: %w", manifest.Layers[i].Digest, ofPlatform(platform), errdefs.ErrNotFound)
		}
	}

	w.seen++
	w.report(desc, manifest, platform, selected, plain, chosen)
	changes, err := w.change(ctx, manifest.Layers, chosen)
	if err != nil && desc.Platform != nil {
		err = fmt.Errorf("platform %s: %w", platforms.FormatAll(*desc.Platform), err)
	}
	if err != nil {
		return outcome{}, err
	}
	layers := slices.Clone(manifest.Layers)
	for i, c := range changes {
		layers[i] = c.desc
	}
	isEncrypted := func(l ocispec.Descriptor) bool { return processor.IsEncrypted(l.MediaType) }
	out.encrypted, out.was = slices.ContainsFunc(layers, isEncrypted), slices.ContainsFunc(manifest.Layers, isEncrypted)
	w.was = w.was || out.was
	e := &edit{list: "layers", changes: changes, mode: mode, done: !out.encrypted, fresh: !out.was, content: w.small(ctx), subject: w.subject(ctx, manifest.Subject)}
	if len(changes) == 0 && e.subject == nil {
		return out, nil
	}
	for i := range changes {
		w.changed[manifest.Layers[i].MediaType+" "+manifest.Layers[i].Digest.String()] = true
	}
	out.changed = true
	out.desc, err = w.rewrite(ctx, desc, doc, e, append([]ocispec.Descriptor{manifest.Config}, layers...))
	return out, err
}

// reads reports whether the operation reads the blob of a layer that it changes.
func (w *work) reads(l ocispec.Descriptor) bool {
	switch w.op.mode() {
	case rewrapping:
		return false
	case encrypting: // more recipients for an encrypted layer take its key alone
		return !processor.IsEncrypted(l.MediaType) || !processor.HasRecipients(l)
	}
	return true
}

// rewrite writes the edited document and returns what describes it.
func (w *work) rewrite(ctx context.Context, desc ocispec.Descriptor, doc []byte, e *edit, children []ocispec.Descriptor) (ocispec.Descriptor, error) {
	doc, mediaType, err := e.apply(doc, desc.MediaType)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("rewrite %s: %w", desc.Digest, err)
	}
	if w.op.mode() != decrypting {
		if err := checkPushed(doc); err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("%s: %w", desc.Digest, err)
		}
	}
	out := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(doc), Size: int64(len(doc))}
	if w.dry {
		return out, nil
	}
	if _, _, err := w.ingest(ctx, "manifest-"+out.Digest.Encoded(), bytes.NewReader(doc), out.Size, gcLabels(children)); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("write %s: %w", out.Digest, err)
	}
	return out, nil
}

// document reads a manifest or an index. One that is both is an error: whoever
// reads it as the other sees another image (CVE-2021-41190).
func (w *work) document(ctx context.Context, desc ocispec.Descriptor) ([]byte, error) {
	if err := w.usage.document(); err != nil {
		return nil, err
	}
	ra, err := w.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer ra.Close()
	if err := w.usage.read(max(ra.Size(), desc.Size)); err != nil {
		return nil, err
	}
	doc := make([]byte, ra.Size())
	if _, err := io.ReadFull(content.NewReader(ra), doc); err != nil {
		return nil, err
	}
	kind, err := kindOf(doc)
	if err == nil && kind == bothKinds {
		err = errors.New("it is an index and a manifest at once")
	}
	if err == nil && (w.op.mode() == encrypting || w.strict) {
		err = oneReading(doc) // or what somebody else finds in it is not reported
	}
	return doc, err
}

// platformOf returns the platform that the index says, or else the image's
// configuration, or nil if neither does.
func (w *work) platformOf(ctx context.Context, desc ocispec.Descriptor, m ocispec.Manifest) *ocispec.Platform {
	if desc.Platform != nil {
		return desc.Platform
	}
	if !images.IsConfigType(m.Config.MediaType) {
		return nil
	}
	if info, err := w.Info(ctx, m.Config.Digest); err == nil && info.Size > maxManifest {
		return nil // it would be read into memory
	}
	p, err := images.ConfigPlatform(ctx, w.Store, m.Config)
	if err != nil || p.OS == "" {
		return nil
	}
	return &p
}

// platform reports whether a manifest for p is selected.
func (w *work) platform(p *ocispec.Platform) bool {
	if len(w.Platforms) == 0 {
		return true
	}
	if p == nil {
		return false
	}
	found := false
	for i, want := range w.Platforms {
		if platforms.NewMatcher(want).Match(*p) {
			w.matched[i], found = true, true
		}
	}
	return found
}

// layer reports whether layer i of n is selected.
func (w *work) layer(i, n int) bool {
	found := len(w.Layers) == 0
	for _, l := range w.Layers {
		if l == i || l == i-n {
			w.inRange[l], found = true, true
		}
	}
	return found
}

func ofPlatform(p *ocispec.Platform) string {
	if p == nil {
		return ""
	}
	return " of platform " + platforms.FormatAll(*p)
}

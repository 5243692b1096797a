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

// mode is what is done to the layers of an image, and so what changes in the
// documents that describe them.
type mode int

const (
	encrypting mode = iota // media types change, and annotations of encryption are added
	decrypting             // the same, undone
	rewrapping             // annotations of recipients change, and nothing else
	inspecting             // nothing changes
	converting             // layers become eStargz, and diff IDs change
)

// layerFunc changes a layer and returns how its descriptor changes.
type layerFunc func(ctx context.Context, w *work, desc ocispec.Descriptor) (change, error)

// work is one image being worked on.
type work struct {
	Store
	Options
	mode    mode
	layer   layerFunc                                     // nil when inspecting
	dry     bool                                          // nothing is written
	written func(desc ocispec.Descriptor, doc []byte)     // gets what a dry run would write; may be nil
	enter   func(context.Context, ocispec.Manifest) error // is called before the layers of a manifest change; may be nil
	// configure returns the new configuration of a manifest whose layers changed; may be nil.
	configure func(ctx context.Context, w *work, m ocispec.Manifest, changes map[int]change) (*ocispec.Descriptor, error)
	was       bool  // some manifest had encrypted layers, as far as is known
	strict    bool  // a document that can be read in several ways is an error
	blobs     blobs // by layer
	usage     usage
	skipped   []ocispec.Descriptor
	leftOut   []ocispec.Descriptor
	plain     []Plain
	// encrypted are the layers, as they are in target, of which the blob is
	// encrypted, or will be.
	encrypted []Plain
	done      map[string]*visited                  // by [visitKey]
	entries   map[digest.Digest]indexEntry         // of indexes
	renamed   map[digest.Digest]ocispec.Descriptor // what replaced a manifest or index
	unchanged []digest.Digest                      // of manifests and indexes that stay as they are
	seen      int                                  // manifests that are here, with what is needed of them
	changed   map[string]bool                      // layers, each once however many manifests have it
	matched   map[int]bool                         // by index into Options.Platforms
	inRange   map[int]bool                         // the Layers that some manifest has
	hasBase   bool                                 // some manifest has a layer of Base
	lacking   []string
	checked   map[digest.Digest]bool // plain layers that nodes compare with a diff ID
	// diffIDs are those that configurations say such a layer has.
	diffIDs map[digest.Digest][]digest.Digest
}

func newWork(store Store, opts Options, mode mode, layer layerFunc) *work {
	return &work{
		Store: store, Options: opts, mode: mode, layer: layer, matched: map[int]bool{}, inRange: map[int]bool{},
		changed: map[string]bool{}, done: map[string]*visited{}, entries: map[digest.Digest]indexEntry{}, renamed: map[digest.Digest]ocispec.Descriptor{},
		checked: map[digest.Digest]bool{}, diffIDs: map[digest.Digest][]digest.Digest{},
	}
}

// run changes the image target.
func (w *work) run(ctx context.Context, target ocispec.Descriptor) (Result, error) {
	out, err := w.visit(ctx, target, 0)
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

// changes reports whether a layer changes. Those that are encrypted
// already get more recipients when encrypting.
func (m mode) changes(l ocispec.Descriptor) bool {
	switch m {
	case encrypting:
		return true
	case converting:
		return isConvertible(l)
	case inspecting:
		return false
	}
	return processor.IsEncrypted(l.MediaType)
}

// outcome is what became of a manifest or an index.
type outcome struct {
	desc      ocispec.Descriptor // MediaType, Digest and Size
	changed   bool
	encrypted bool // it has encrypted layers, as far as can be seen
	was       bool // it had encrypted layers before
	// layers are those of a manifest that are selected, and children the visit keys
	// of an index's entries, if the image is inspected.
	layers   []Layer
	children []string
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
	err    error
	listed bool // by [work.list]
}

// visitKey returns what the outcome of a manifest or index depends on: the same
// manifest may be listed for several platforms, of which one is selected.
func visitKey(desc ocispec.Descriptor) string {
	platform, err := json.Marshal(desc.Platform)
	if err != nil {
		panic(err) // strings
	}
	return fmt.Sprint(desc.MediaType, desc.Digest, desc.Size, string(platform), IsAttestation(desc))
}

// visit works on a manifest or an index and all below it, once however often it is
// listed.
func (w *work) visit(ctx context.Context, desc ocispec.Descriptor, depth int) (outcome, error) {
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
	return outcome{}, fmt.Errorf("%s is not an image, its type is %q", desc.Digest, desc.MediaType)
}

// list returns the layers below what was visited with that key, in the order of the
// documents, each manifest's once.
func (w *work) list(key string) []Layer {
	v := w.done[key]
	if v == nil || v.listed {
		return nil
	}
	v.listed = true
	layers := v.layers
	for _, child := range v.children {
		layers = append(layers, w.list(child)...)
	}
	return layers
}

// manifest works on a manifest: it selects layers, reports what is readable, changes
// the layers, and rewrites the manifest.
func (w *work) manifest(ctx context.Context, desc ocispec.Descriptor, top bool) (outcome, error) {
	doc, err := w.document(ctx, desc)
	if errdefs.IsNotFound(err) && !top {
		if w.selectsPlatform(desc.Platform) && len(w.Platforms) > 0 && !IsAttestation(desc) && (w.mode != inspecting || w.strict) {
			return outcome{}, fmt.Errorf("platform %s: manifest %s is not here: %w", platforms.FormatAll(*desc.Platform), desc.Digest, errdefs.ErrNotFound)
		}
		return outcome{}, errAbsent
	}
	var manifest ocispec.Manifest
	if err == nil {
		w.addUnlike(desc, doc)
		err = json.Unmarshal(doc, &manifest)
	}
	if err == nil {
		err = w.usage.manifest(manifest.Layers)
	}
	if err != nil {
		return outcome{}, fmt.Errorf("manifest %s: %w", desc.Digest, err)
	}
	c, err := w.choose(ctx, desc, manifest)
	if err != nil {
		return outcome{}, err
	}
	if err := w.checkChosen(ctx, desc, manifest, c, top); err != nil {
		return outcome{}, err
	}
	w.seen++
	w.report(desc, manifest, c)
	if w.mode == inspecting {
		return w.inspected(desc, manifest, c), nil
	}

	if w.enter != nil && len(c.layers) > 0 {
		if err := w.enter(ctx, manifest); err != nil {
			return outcome{}, fmt.Errorf("manifest %s: %w", desc.Digest, err)
		}
	}
	w.noteChecked(ctx, desc, manifest)
	if w.mode == converting && w.diffIDsOf(ctx, desc, manifest) == nil {
		c.layers = nil // it is no image
	}
	changes, err := w.changeLayers(ctx, manifest.Layers, c.layers)
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
	out := outcome{desc: desc, encrypted: anyEncrypted(layers), was: anyEncrypted(manifest.Layers)}
	w.was = w.was || out.was
	e := &edit{list: "layers", changes: changes, mode: w.mode, done: !out.encrypted, fresh: !out.was, content: w.small(ctx), subject: w.subject(ctx, manifest.Subject)}
	if len(changes) == 0 && e.subject == nil {
		return out, nil
	}
	if w.configure != nil && len(changes) > 0 {
		if e.config, err = w.configure(ctx, w, manifest, changes); err != nil {
			return outcome{}, fmt.Errorf("configuration %s: %w", manifest.Config.Digest, err)
		}
	}
	for i := range changes {
		w.changed[manifest.Layers[i].MediaType+" "+manifest.Layers[i].Digest.String()] = true
	}
	out.changed = true
	out.desc, err = w.rewrite(ctx, desc, doc, e, append([]ocispec.Descriptor{manifest.Config}, layers...))
	return out, err
}

func anyEncrypted(layers []ocispec.Descriptor) bool {
	return slices.ContainsFunc(layers, func(l ocispec.Descriptor) bool { return processor.IsEncrypted(l.MediaType) })
}

// inspected is the outcome of a manifest that is only inspected.
func (w *work) inspected(desc ocispec.Descriptor, m ocispec.Manifest, c choice) outcome {
	out := outcome{desc: desc, encrypted: anyEncrypted(m.Layers), was: anyEncrypted(m.Layers)}
	for i, l := range m.Layers {
		if c.selected && w.selectsLayer(i, len(m.Layers)) {
			out.layers = append(out.layers, Layer{Index: i, Platform: c.platform, Descriptor: l})
		}
	}
	return out
}

// choice is what happens to the layers of a manifest.
type choice struct {
	platform *ocispec.Platform // of the manifest, or nil
	selected bool              // the manifest is
	layers   []int             // indexes of those that change
	plain    map[int]Reason    // why others stay readable, by index
}

func (w *work) choose(ctx context.Context, desc ocispec.Descriptor, m ocispec.Manifest) (choice, error) {
	c := choice{platform: w.platformOf(ctx, desc, m), plain: make(map[int]Reason)}
	if c.selected = w.selectsPlatform(c.platform); c.selected {
		w.noteLacking(c.platform, m.Layers)
	}
	for i, l := range m.Layers {
		switch {
		case !c.selected || !w.selectsLayer(i, len(m.Layers)) || w.inBase(l):
			c.plain[i] = ReasonNotSelected
			continue
		case w.mode == encrypting && w.Attestations == KeepAttestations && IsAttestation(desc):
			c.plain[i] = ReasonAttestation
			continue
		case w.mode == encrypting, w.mode == converting:
			reason, err := w.unencryptable(ctx, l)
			if err != nil {
				return choice{}, fmt.Errorf("layer %s: %w", l.Digest, err)
			}
			if reason != "" {
				c.plain[i] = reason
				continue
			}
		}
		if w.mode.changes(l) {
			c.layers = append(c.layers, i)
		}
	}
	return c, nil
}

// checkChosen returns an error if layers that are to change can't be read. It is
// errAbsent if that means that the manifest is not here.
func (w *work) checkChosen(ctx context.Context, desc ocispec.Descriptor, m ocispec.Manifest, c choice, top bool) error {
	for _, i := range c.layers {
		l := m.Layers[i]
		if (w.mode == encrypting || w.mode == converting) && strangeData(l) {
			return fmt.Errorf("manifest %s: %w", desc.Digest, errData(l))
		}
		if !w.reads(l) {
			continue
		}
		switch here, err := w.has(ctx, l); {
		case err != nil:
			return fmt.Errorf("layer %s: %w", l.Digest, err)
		case !here && !top && (len(w.Platforms) == 0 || IsAttestation(desc)):
			return errAbsent
		case !here:
			return fmt.Errorf("layer %s%s is not here: %w", l.Digest, ofPlatform(c.platform), errdefs.ErrNotFound)
		}
	}
	return nil
}

// reads reports whether the blob of a layer that changes is read.
func (w *work) reads(l ocispec.Descriptor) bool {
	switch w.mode {
	case rewrapping:
		return false
	case converting:
		return true
	case encrypting: // for more recipients of an encrypted layer, its key is enough
		return !processor.IsEncrypted(l.MediaType) || !processor.HasRecipients(l)
	}
	return !w.dry
}

// rewrite writes the edited document and returns what describes it.
func (w *work) rewrite(ctx context.Context, desc ocispec.Descriptor, doc []byte, e *edit, children []ocispec.Descriptor) (ocispec.Descriptor, error) {
	doc, mediaType, err := e.apply(doc, desc.MediaType)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("rewrite %s: %w", desc.Digest, err)
	}
	if w.mode != decrypting {
		if err := checkPushed(doc); err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("%s: %w", desc.Digest, err)
		}
	}
	out := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(doc), Size: int64(len(doc))}
	if w.dry {
		if w.written != nil {
			w.written(out, doc)
		}
		return out, nil
	}
	if _, _, err := w.ingest(ctx, "manifest-"+out.Digest.Encoded(), mediaType, bytes.NewReader(doc), out.Size, gcLabels(children)); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("write %s: %w", out.Digest, err)
	}
	return out, nil
}

// document reads a manifest or an index. One that is both is an error, since
// readers that take it for the other see another image (CVE-2021-41190).
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
	if err == nil && (w.mode == encrypting || w.strict) {
		err = oneReading(doc) // or what somebody else finds in it is not reported
	}
	return doc, err
}

package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// indexWork is one index being worked on.
type indexWork struct {
	*work
	desc   ocispec.Descriptor
	list   []ocispec.Descriptor // its entries
	known  []string             // digests of entries that are known not to be encrypted
	edit   *edit
	out    outcome
	absent map[digest.Digest]bool
}

func (w *work) index(ctx context.Context, desc ocispec.Descriptor, depth int) (outcome, error) {
	if depth >= maxDepth {
		return outcome{}, errDepth(desc.Digest)
	}
	doc, err := w.document(ctx, desc)
	if errdefs.IsNotFound(err) && depth > 0 {
		return outcome{}, errAbsent
	}
	if err != nil {
		return outcome{}, fmt.Errorf("index %s: %w", desc.Digest, err)
	}
	w.addUnlike(desc, doc)
	var index ocispec.Index
	if err := json.Unmarshal(doc, &index); err != nil {
		return outcome{}, fmt.Errorf("index %s: %w", desc.Digest, err)
	}
	notes, err := restoreOf(doc)
	if err != nil {
		return outcome{}, fmt.Errorf("index %s: %w", desc.Digest, err)
	}
	iw := &indexWork{work: w, desc: desc, list: w.ofSelection(ctx, index.Manifests), known: notes.plain(), out: outcome{desc: desc}, absent: map[digest.Digest]bool{}}
	iw.edit = &edit{list: "manifests", changes: make(map[int]change), renamed: w.renamed, mode: w.mode, content: w.small(ctx)}
	for _, e := range iw.list {
		w.entries[e.Digest] = indexEntry{e, depth + 1}
	}
	if err := iw.run(ctx, depth); err != nil {
		return outcome{}, err
	}
	if w.mode == inspecting {
		for _, e := range iw.list {
			iw.out.children = append(iw.out.children, visitKey(e))
		}
		return iw.out, nil
	}
	e, out := iw.edit, iw.out
	if len(iw.list) > 0 && len(e.removed) == len(iw.list) {
		if depth == 0 {
			return out, nil // which is an error: nothing of the image is here
		}
		return outcome{}, errAbsent
	}
	e.subject = w.subject(ctx, index.Subject)
	e.done, e.fresh, e.was, e.nested = !out.encrypted, !w.was, out.was, depth > 0
	// An index may have changed by what was left out, or by what an attestation is
	// about, and by nothing else.
	restores := w.mode == decrypting && e.done && notes[removedKey] != ""
	if out.changed = out.changed || len(e.removed) > 0 || e.subject != nil || restores || iw.follows(); !out.changed {
		return out, nil
	}
	children := slices.Clone(index.Manifests)
	for i, c := range e.changes {
		children[i].MediaType, children[i].Digest, children[i].Size = c.desc.MediaType, c.desc.Digest, c.desc.Size
	}
	for _, i := range slices.Backward(e.removed) {
		children = slices.Delete(children, i, i+1)
	}
	out.desc, err = w.rewrite(ctx, desc, doc, e, children)
	return out, err
}

// run works on the entries of the index: attestations after the others, since what
// becomes of them depends on what they are about.
func (w *indexWork) run(ctx context.Context, depth int) error {
	for _, attestations := range []bool{false, true} {
		for i, e := range w.list {
			if IsAttestation(e) != attestations {
				continue
			}
			if err := w.entry(ctx, i, e, depth); err != nil {
				return err
			}
		}
	}
	slices.Sort(w.edit.removed)
	// What is not here may be encrypted, unless nothing here ever was.
	for d := range w.absent {
		if slices.Contains(w.known, d.String()) || w.mode != decrypting && !w.out.was {
			w.edit.plain = append(w.edit.plain, d.String())
		} else {
			w.out.encrypted = true
		}
	}
	slices.Sort(w.edit.plain)
	return nil
}

// entry works on entry i.
func (w *indexWork) entry(ctx context.Context, i int, e ocispec.Descriptor, depth int) error {
	if IsAttestation(e) && w.mode == encrypting &&
		(w.Attestations == DropAttestations || w.isRemoved(digest.Digest(e.Annotations[attestationAnnotation]))) {
		w.leaveOut(i)
		return nil
	}
	if !isIndex(e.MediaType) && !isManifest(e.MediaType) {
		return w.other(ctx, i, e)
	}
	c, err := w.visit(ctx, e, depth+1)
	switch {
	case errors.Is(err, errAbsent):
		w.isAbsent(i)
		return nil
	case err != nil:
		return err
	}
	// Entries of an index that was not encrypted may be absent.
	c.encrypted = c.encrypted && !slices.Contains(w.known, e.Digest.String())
	w.out.encrypted, w.out.was = w.out.encrypted || c.encrypted, w.out.was || c.was
	if !c.encrypted {
		w.edit.plain = append(w.edit.plain, c.desc.Digest.String())
	}
	if c.changed {
		w.out.changed = true
		w.edit.changes[i] = change{desc: c.desc}
	}
	return nil
}

// other deals with an entry that is neither a manifest nor an index.
func (w *indexWork) other(ctx context.Context, i int, e ocispec.Descriptor) error {
	if w.mode != encrypting && w.mode != inspecting {
		return nil
	}
	here, err := w.has(ctx, e)
	switch {
	case err != nil:
		return err
	case w.mode == encrypting && !here && !w.KeepAbsent:
		w.leaveOut(i)
	case !here:
		w.addPlain(w.desc, e, e.Platform, ReasonAbsent)
	case w.selectsPlatform(e.Platform) || w.mode == encrypting:
		w.addPlain(w.desc, e, e.Platform, ReasonNotImage)
	}
	return nil
}

// isAbsent deals with entry i, whose content is not in the store.
func (w *indexWork) isAbsent(i int) {
	e := w.list[i]
	switch {
	case w.mode == encrypting && !w.KeepAbsent:
		w.leaveOut(i)
		return
	case w.mode == encrypting, w.mode == inspecting && w.selectsPlatform(e.Platform):
		w.addPlain(w.desc, e, e.Platform, ReasonAbsent)
	}
	if len(w.Platforms) == 0 {
		w.skipped = append(w.skipped, e)
	}
	w.absent[e.Digest] = true
}

// leaveOut leaves entry i out of the new index.
func (w *indexWork) leaveOut(i int) {
	w.edit.removed = append(w.edit.removed, i)
	w.leftOut = append(w.leftOut, w.list[i])
}

// isRemoved reports whether the entry of that digest is left out.
func (w *indexWork) isRemoved(d digest.Digest) bool {
	return slices.ContainsFunc(w.edit.removed, func(i int) bool { return w.list[i].Digest == d })
}

// follows reports whether an attestation is about something that changed, which may
// be in another index.
func (w *indexWork) follows() bool {
	return slices.ContainsFunc(w.list, func(e ocispec.Descriptor) bool {
		_, ok := w.renamed[digest.Digest(e.Annotations[attestationAnnotation])]
		return ok
	})
}

// subject returns what took the place of the manifest or index that a subject is,
// after working on that if it is in this image, or nil if nothing did.
func (w *work) subject(ctx context.Context, subject *ocispec.Descriptor) *ocispec.Descriptor {
	if subject == nil {
		return nil
	}
	if e, ok := w.entries[subject.Digest]; ok {
		// Its error is that of its own entry.
		_, _ = w.visit(ctx, e.Descriptor, e.depth)
	}
	if now, ok := w.renamed[subject.Digest]; ok {
		return &now
	}
	return nil
}

// entryPlatform returns the platform of an entry of an index, as platformOf does.
func (w *work) entryPlatform(ctx context.Context, e ocispec.Descriptor) *ocispec.Platform {
	if e.Platform != nil || !isManifest(e.MediaType) {
		return e.Platform
	}
	doc, err := w.document(ctx, e)
	if err != nil {
		return nil // an error of that entry's own
	}
	var m ocispec.Manifest
	if json.Unmarshal(doc, &m) != nil {
		return nil
	}
	return w.platformOf(ctx, e, m)
}

// ofSelection returns the entries of an index, attestations with the platform of
// what they are about, so that a selection of that selects them too.
func (w *work) ofSelection(ctx context.Context, entries []ocispec.Descriptor) []ocispec.Descriptor {
	if len(w.Platforms) == 0 {
		return entries
	}
	about := make(map[string]*ocispec.Platform)
	for _, e := range entries {
		if !IsAttestation(e) {
			about[e.Digest.String()] = w.entryPlatform(ctx, e)
		}
	}
	entries = slices.Clone(entries)
	for i, e := range entries {
		if p := about[e.Annotations[attestationAnnotation]]; p != nil && IsAttestation(e) {
			entries[i].Platform = p
		}
	}
	return entries
}

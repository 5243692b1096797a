package image

import (
	"context"
	"errors"
	"slices"

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
		if slices.Contains(w.known, d.String()) || w.op.mode() != decrypting && !w.out.was {
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
	if IsAttestation(e) && w.op.mode() == encrypting &&
		(w.Attestations == DropAttestations || w.isRemoved(digest.Digest(e.Annotations[attestationAnnotation]))) {
		w.leaveOut(i)
		return nil
	}
	if !isIndex(e.MediaType) && !isManifest(e.MediaType) {
		return w.other(ctx, i, e)
	}
	c, err := w.any(ctx, e, depth+1)
	switch {
	case errors.Is(err, errAbsent):
		w.isAbsent(i)
		return nil
	case err != nil:
		return err
	}
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
	mode := w.op.mode()
	if mode != encrypting && mode != inspecting {
		return nil
	}
	here, err := w.has(ctx, e)
	switch {
	case err != nil:
		return err
	case mode == encrypting && !here && !w.KeepAbsent:
		w.leaveOut(i)
	case !here:
		w.addPlain(w.desc, e, e.Platform, ReasonAbsent)
	case w.platform(e.Platform) || mode == encrypting:
		w.addPlain(w.desc, e, e.Platform, ReasonNotImage)
	}
	return nil
}

// isAbsent deals with entry i, whose content is not in the store.
func (w *indexWork) isAbsent(i int) {
	e := w.list[i]
	switch {
	case w.op.mode() == encrypting && !w.KeepAbsent:
		w.leaveOut(i)
		return
	case w.op.mode() == encrypting, w.op.mode() == inspecting && w.platform(e.Platform):
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

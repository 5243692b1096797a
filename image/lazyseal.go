package image

import (
	"context"
	"io"
	"maps"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// NotLazy is a layer that says that it can be pulled lazily, and was not sealed for it.
type NotLazy struct {
	Digest digest.Digest `json:"digest"` // of the plain layer
	Reason string        `json:"reason"`
}

// IsLazy reports whether an encrypted layer has a seal for lazy pulling, which only its key
// can show to be right: see [SealedLazy].
func IsLazy(l ocispec.Descriptor) bool {
	return l.Annotations[lazyAnnotation] != "" && l.Annotations[tocAnnotation] != ""
}

// check begins to check a plain layer that says that it can be pulled lazily, or returns
// nil.
func (e *encryption) check(ctx context.Context, w *work, desc ocispec.Descriptor) *lazyCheck {
	if !isMarked(desc) {
		return nil
	}
	c, err := w.newLazyCheck(ctx, desc)
	if err != nil {
		e.fail(desc, err)
		return nil
	}
	return c
}

// seal adds the seal of a layer, whose plain form was written to check, to its annotations.
// check may be nil. The error is that of wrapping its key.
func (e *encryption) seal(ctx context.Context, w *work, desc ocispec.Descriptor, key *processor.LayerKey, check *lazyCheck, c change) error {
	if check == nil {
		return nil
	}
	l, err := check.lazy(w.diffIDs[desc.Digest])
	if err == nil {
		c.annotations[lazyAnnotation], err = l.annotation(key)
	}
	if err != nil {
		delete(c.annotations, lazyAnnotation)
		e.fail(desc, err)
		return nil
	}
	e.isSealed(desc)
	return e.wrapSeal(ctx, desc, key, l, c)
}

// wrapSeal wraps what was sealed of a layer together with its key, once more, so that those
// who can decrypt the layer can't seal something else.
func (e *encryption) wrapSeal(ctx context.Context, desc ocispec.Descriptor, key *processor.LayerKey, l Lazy, c change) error {
	if l.IsWrapped(key) {
		return nil
	}
	again, err := e.wrap(ctx, desc, key.WithSealed(l.wrapped()))
	maps.Copy(c.annotations, again.annotations)
	return err
}

// sealTaken returns how a plain layer changes that became one of the earlier image. The
// seal of that is taken over where it is known who made it and it says what the plain image
// says. Otherwise the plain layer is read, since those who can write the earlier image must
// not choose what nodes mount.
func (e *encryption) sealTaken(ctx context.Context, w *work, desc ocispec.Descriptor, p layerPlan) (change, error) {
	if !isMarked(desc) {
		return p.change, nil
	}
	was := *p.taken
	l, err := SealedLazy(p.takenKey.LayerKey, was)
	ids := w.diffIDs[desc.Digest]
	if err == nil && p.takenKey.trusted && l.TOC.String() == desc.Annotations[tocAnnotation] && slices.Equal(ids, []digest.Digest{l.DiffID}) {
		p.change.annotations[lazyAnnotation] = was.Annotations[lazyAnnotation]
		e.isSealed(desc)
		return p.change, e.wrapSeal(ctx, desc, p.takenKey.LayerKey, l, p.change)
	}
	check := e.check(ctx, w, desc)
	if check == nil {
		return p.change, nil
	}
	defer check.close()
	if err := w.feed(ctx, desc, check); err != nil {
		return change{}, err
	}
	return p.change, e.seal(ctx, w, desc, p.takenKey.LayerKey, check, p.change)
}

// feed writes a plain layer to check.
func (w *work) feed(ctx context.Context, desc ocispec.Descriptor, check *lazyCheck) error {
	return w.read(ctx, desc, func(r io.Reader) error {
		_, err := io.CopyBuffer(writerOnly{check}, &contextReader{ctx, r}, make([]byte, processor.BufferSize))
		return err
	})
}

func (e *encryption) isSealed(desc ocispec.Descriptor) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.sealed == nil {
		e.sealed = make(map[digest.Digest]bool)
	}
	e.sealed[desc.Digest] = true
}

// fail notes why a layer is not sealed.
func (e *encryption) fail(desc ocispec.Descriptor, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.notLazy = append(e.notLazy, NotLazy{desc.Digest, err.Error()})
}

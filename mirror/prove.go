package mirror

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/internal/claims"
	"github.com/ctrlplane/pilot/internal/layerkeys"
	"github.com/ctrlplane/pilot/processor"
)

const (
	// proveTimeout bounds the reading of a whole layer.
	proveTimeout = 30 * time.Minute
	// proveWait is how long a request waits for that. The snapshotter waits for 30 seconds.
	proveWait = 20 * time.Second
)

// errProving is the error of a layer that is being read as a whole.
var errProving = errors.New("another image of this machine, or an earlier one, has a layer with the same diff ID or may have it, so the layer is being read as a whole, to find out whether it has that: try again")

// proof is what was found out about a layer by reading it as a whole.
type proof struct{ err error } // nil: it is what its key has sealed

// checkShared returns an error if the layer's snapshot must not be shared with the other
// images that have another blob, or the same one with another seal, unpacked under its diff
// ID. Their makers have not agreed to that: everybody who may wrap for a KEK of this machine
// can seal what they like. If all of them say that the layer has the same table of contents,
// it shows the same files. If not, it is read as a whole, as is one that other KEKs vouch for in
// the record.
func (m *Mirror) checkShared(ctx context.Context, repo *repository, layer *lazyLayer, all []claims.Claim) error {
	if m.isVouchedOtherwise(layer) {
		return m.prove(ctx, repo, layer)
	}
	for _, c := range all {
		if c.Unread {
			// It may have the diff ID, too.
			if m.lazy.first(failureKey{layer: c.Manifest, reason: reasonClaim}) {
				logrus.WithFields(logrus.Fields{"manifest": c.Manifest, "namespace": c.Namespace}).
					Warn("an image's manifest or configuration is too large to be read: lazy layers are read as a whole as long as it is there: remove it")
			}
			return m.prove(ctx, repo, layer)
		}
		if c.ChainID == layer.sealed.DiffID && c.DiffID != c.ChainID {
			// It would be mounted in the place of all those layers, and can't be that.
			return m.prove(ctx, repo, layer)
		}
		if c.DiffID == layer.sealed.DiffID && !layer.isOf(c.Layer) && !m.vouches(ctx, layer, c) {
			return m.prove(ctx, repo, layer)
		}
	}
	return nil
}

// isVouchedOtherwise reports whether a KEK vouches for the layer's diff ID in the record that
// does not vouch for what is sealed of it now: a rule of must-be-encrypted would be content with
// that, whichever blob and seal is mounted.
func (m *Mirror) isVouchedOtherwise(layer *lazyLayer) bool {
	if m.conf.Record == nil || m.conf.Rules == nil || len(m.conf.Rules()) == 0 {
		return false
	}
	layer.mu.Lock()
	by := layer.openedBy
	layer.mu.Unlock()
	known, _ := m.conf.Record.Layer(layer.sealed.DiffID)
	return slices.ContainsFunc(known.Blobs, func(b layerkeys.Blob) bool {
		return slices.ContainsFunc(b.Vouched, func(k layerkeys.KEK) bool { return !by.Vouches || k.ID != by.KEK })
	})
}

// maxVouched bounds the claims of which it is remembered that they vouch for a layer.
const maxVouched = 256

// vouches reports whether the maker of an image says that the layer with the diff ID has the
// table of contents that is sealed: in its seal, or, of a plain layer and of the same blob,
// in its annotation, which is as good as the rest of that image.
func (m *Mirror) vouches(ctx context.Context, layer *lazyLayer, c claims.Claim) bool {
	// Of the same blob, there may be several seals.
	if !processor.IsEncrypted(c.Layer.MediaType) || c.Layer.Digest == layer.desc.Digest {
		return c.Layer.Annotations[tocAnnotation] == layer.sealed.TOC.String()
	}
	m.lazy.mu.Lock()
	known := slices.ContainsFunc(layer.vouched, func(l ocispec.Descriptor) bool { return sameLayer(l, c.Layer) })
	m.lazy.mu.Unlock()
	if known {
		return true
	}
	key, err := m.unwrap(ctx, c.Layer)
	if err != nil {
		return false
	}
	defer key.Clear()
	sealed, err := image.SealedLazy(key, c.Layer)
	if err != nil || sealed.DiffID != layer.sealed.DiffID || sealed.TOC != layer.sealed.TOC {
		return false
	}
	m.lazy.mu.Lock()
	defer m.lazy.mu.Unlock()
	if len(layer.vouched) >= maxVouched {
		layer.vouched = nil
	}
	layer.vouched = append(layer.vouched, c.Layer)
	return true
}

// prove reads a layer as a whole, unless that was done, and returns an error if it is not
// what its key has sealed.
func (m *Mirror) prove(ctx context.Context, repo *repository, layer *lazyLayer) error {
	if p := layer.proof.Load(); p != nil {
		return p.err
	}
	proved := m.lazy.proofs.DoChan(fmt.Sprint(layer.desc.Digest, layer.sealed), func() (any, error) {
		if p := layer.proof.Load(); p != nil {
			return nil, p.err
		}
		return nil, m.readWhole(context.WithoutCancel(ctx), repo, layer)
	})
	within, cancel := context.WithTimeout(ctx, proveWait)
	defer cancel()
	select {
	case r := <-proved:
		return r.Err
	case <-within.Done():
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return errProving
	}
}

func (m *Mirror) readWhole(ctx context.Context, repo *repository, layer *lazyLayer) error {
	ctx, cancel := context.WithTimeout(ctx, proveTimeout)
	defer cancel()
	leave, err := enter(ctx, m.lazy.proving)
	if err != nil {
		return err
	}
	defer leave()
	began := time.Now()
	end, err := m.tail(ctx, repo, layer)
	if err != nil {
		return err
	}
	if first, err := m.readLazy(ctx, repo, layer, 0, 1); err == nil {
		first.Close() // where the layer is may have changed
	}
	from, err := m.wholeAt(ctx, repo, layer)
	if err != nil {
		return err
	}
	body, err := from.Stream(ctx, ocispec.Descriptor{MediaType: octets, Digest: layer.desc.Digest, Size: layer.desc.Size})
	if err != nil {
		return err
	}
	defer body.Close()
	blob := layer.desc.Digest.Verifier()
	plain, err := layer.decrypter(io.TeeReader(body, blob))
	if err != nil {
		return err
	}
	defer plain.Close()
	plain.HashPlain()
	err = image.VerifyLazy(plain, layer.sealed, end)
	if errors.Is(err, processor.ErrTampered) {
		// Other bytes than the blob's say nothing about who has sealed it.
		if _, rest := io.Copy(io.Discard, plain); rest != nil && !blob.Verified() {
			layer.setSought(nil)
			err = fmt.Errorf("%s has sent other bytes than the layer's", from.key())
		}
	}
	log := logrus.WithFields(ofLayer(layer.desc)).WithFields(logrus.Fields{"image": repo.key(), "bytes": layer.desc.Size, "took": time.Since(began), "diff-id": layer.sealed.DiffID})
	switch {
	case err == nil:
		if err = m.record(layer, layerkeys.Decrypted, plain.PlainDigest()); err != nil {
			break
		}
		layer.proof.Store(&proof{})
		log.Info("lazy layer read as a whole: another image has its diff ID, or may have it")
	case errors.Is(err, processor.ErrTampered):
		err = m.refute(layer, err)
	}
	m.lazy.metrics.proofs.WithLabelValues(m.judgeLazy(err).result.String()).Inc()
	return err
}

// refute makes sure that nothing more of a layer is served.
func (m *Mirror) refute(layer *lazyLayer, err error) error {
	err = &notLazy{reasonClaim, fmt.Errorf("%w: it was made to be taken for a layer of another image", err)}
	layer.proof.Store(&proof{err})
	m.withdraw(layer)
	logrus.WithError(err).WithFields(ofLayer(layer.desc)).WithField("diff-id", layer.sealed.DiffID).
		Error("lazy layer is not what it was sealed to be: remove the image, and find out who has encrypted it")
	return err
}

// decrypter returns the plain layer, of which all is verified.
func (l *lazyLayer) decrypter(body io.Reader) (*processor.Decrypter, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.key == nil {
		return nil, fmt.Errorf("layer %s: %w", l.desc.Digest, errKeyGone)
	}
	return processor.NewDecrypter(body, l.key)
}

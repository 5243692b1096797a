package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/processor"
)

// BuildKit drops the annotations of the descriptors that it hands to a differ,
// and with them the wrapped layer keys. The image's manifest has them, and it is
// in the same content store.

// The bounds of the search for a layer's manifests.
const (
	// maxManifest is the size of the largest blob that may be a manifest.
	// Registries refuse larger manifests.
	maxManifest = 4 << 20
	// maxBlobs and maxBlobBytes bound what is read to find the manifests. A
	// pull of an image leaves two or three small blobs, so that is some two
	// hundred images of one repository.
	maxBlobs     = 500
	maxBlobBytes = 64 << 20
	// maxDescriptors bounds the different descriptors that are tried.
	maxDescriptors = 64
	// maxVerified bounds how often a layer is read to find out which of
	// several keys is its own.
	maxVerified = 16
)

const (
	gcContentLabel = "containerd.io/gc.ref.content"
	sourceLabel    = "containerd.io/distribution.source."
)

// layerKey unwraps the key of the layer that desc describes, with the
// annotations of the manifests that name the layer if desc has none.
func (d *Differ) layerKey(ctx context.Context, keys processor.Keys, desc ocispec.Descriptor) (*processor.LayerKey, error) {
	if processor.HasRecipients(desc) {
		return d.unwrapOne(ctx, d.conf.UnwrapTimeout, keys, desc)
	}
	deadline := time.Now().Add(d.conf.UnwrapTimeout)
	found, reused, failure := d.describedBy(ctx, deadline, desc, false)
	if failure == nil {
		var key *processor.LayerKey
		if key, failure = d.unwrapFound(ctx, deadline, keys, desc, found); failure == nil {
			return key, nil
		}
	}
	if !reused || !errors.Is(failure, processor.ErrNoKey) {
		return nil, failure
	}
	// The manifest with the key may have come since the walk.
	now, _, err := d.describedBy(ctx, deadline, desc, true)
	if err != nil {
		return nil, err
	}
	if reflect.DeepEqual(now, found) {
		return nil, failure
	}
	return d.unwrapFound(ctx, deadline, keys, desc, now)
}

// unwrapFound unwraps the key of the layer desc, which manifests describe as found.
func (d *Differ) unwrapFound(ctx context.Context, deadline time.Time, keys processor.Keys, desc ocispec.Descriptor, found []ocispec.Descriptor) (*processor.LayerKey, error) {
	if len(found) == 1 {
		return d.unwrapOne(ctx, time.Until(deadline), keys, found[0])
	}
	// Anybody who can have an image pulled can add a manifest, and put the key
	// of another layer in it. So a key has to fit the layer's HMAC.
	verified := 0
	return d.keys.UnwrapAny(ctx, time.Until(deadline), keys, found, func(key *processor.LayerKey) (bool, error) {
		if verified++; verified > maxVerified {
			return false, fmt.Errorf("the manifests that name the layer hold more than %d keys that are not its own: remove the images that do not belong here: %w", maxVerified, errdefs.ErrFailedPrecondition)
		}
		if err := d.enter(ctx); err != nil {
			return false, err
		}
		defer d.leave()
		err := d.verify(ctx, desc, key)
		if errors.Is(err, processor.ErrTampered) {
			logrus.WithField("digest", desc.Digest).Warn("a manifest names the layer with a key that is not its own, or the layer was changed")
			return false, nil
		}
		return err == nil, err
	})
}

// unwrapOne unwraps the key of a layer from the annotations of desc.
func (d *Differ) unwrapOne(ctx context.Context, timeout time.Duration, keys processor.Keys, desc ocispec.Descriptor) (*processor.LayerKey, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	key, err := d.keys.Unwrap(ctx, keys, desc)
	if err != nil && !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, processor.ErrNoKey) {
		err = fmt.Errorf("%w: %w", errUnwrap, err)
	}
	return key, err
}

// describedBy returns desc once with each different set of key annotations that
// the manifests of the context's namespace have for the layer, at least one, and
// whether an earlier walk has found them. Other namespaces are not searched: they
// may be other tenants'.
func (d *Differ) describedBy(ctx context.Context, deadline time.Time, desc ocispec.Descriptor, anew bool) (found []ocispec.Descriptor, reused bool, err error) {
	searching, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	w, reused, err := d.manifests.enter(searching, anew)
	if err == nil {
		defer w.leave()
		found, err = w.describedBy(searching, d.store, desc)
	}
	if err != nil && searching.Err() != nil {
		err = fmt.Errorf("search for the layer's key in the namespace's manifests: %w", searching.Err())
	}
	return found, reused, err
}

func (w *namespaceWalk) describedBy(ctx context.Context, store content.Store, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	own, err := store.Info(ctx, desc.Digest)
	if err != nil {
		return nil, err
	}
	blobs := w.manifestsOf(own)
	var found []ocispec.Descriptor
	without := 0 // manifests that name the layer without its key
	bytesLeft := int64(maxBlobBytes)
	for i, info := range blobs {
		if bytesLeft -= info.Size; bytesLeft < 0 || i == maxBlobs || len(found) == maxDescriptors {
			logrus.WithFields(logrus.Fields{"digest": desc.Digest, "read": i, "of": len(blobs)}).Warn("not all manifests that may name the layer were read")
			break
		}
		layers, err := w.layersNamed(ctx, store, info, desc.Digest)
		if err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			logrus.WithError(err).WithField("digest", info.Digest).Debug("blob is not read as a manifest")
			continue
		}
		for _, l := range layers {
			if !processor.HasRecipients(l) {
				without++
				continue
			}
			l = withKeysOf(desc, l)
			if len(found) < maxDescriptors && !slices.ContainsFunc(found, func(f ocispec.Descriptor) bool { return maps.Equal(f.Annotations, l.Annotations) }) {
				found = append(found, l)
			}
		}
	}
	if len(found) > 0 {
		return found, nil
	}
	namespace, _ := namespaces.Namespace(ctx)
	if without > 0 {
		return nil, fmt.Errorf("%w: neither the layer's descriptor nor a manifest in namespace %s has its key: "+
			"the image was built on an encrypted one and lost the key on the way; put it back with \"ctr-pilot images encrypt --keys-from BASE\"", processor.ErrNoKey, namespace)
	}
	return nil, fmt.Errorf("%w: the layer's descriptor has no key annotations, and no manifest in namespace %s names the layer", processor.ErrNoKey, namespace)
}

// encryptedLayers returns the encrypted layers of a manifest, or none if the blob is
// something else.
func encryptedLayers(ctx context.Context, store content.Store, blob content.Info) ([]ocispec.Descriptor, error) {
	ra, err := store.ReaderAt(ctx, ocispec.Descriptor{Digest: blob.Digest, Size: blob.Size})
	if err != nil {
		return nil, err
	}
	defer ra.Close()
	doc := make([]byte, blob.Size)
	if _, err := io.ReadFull(content.NewReader(ra), doc); err != nil {
		return nil, err
	}
	if !bytes.Contains(doc, []byte("encrypted")) {
		return nil, nil
	}
	var manifest ocispec.Manifest
	if err := json.Unmarshal(doc, &manifest); err != nil {
		return nil, nil
	}
	return slices.DeleteFunc(manifest.Layers, func(l ocispec.Descriptor) bool {
		return !processor.IsEncrypted(l.MediaType)
	}), nil
}

// withKeysOf returns desc with the annotations of encryption that l has.
func withKeysOf(desc, l ocispec.Descriptor) ocispec.Descriptor {
	desc.Annotations = maps.Clone(desc.Annotations)
	if desc.Annotations == nil {
		desc.Annotations = make(map[string]string)
	}
	for key, value := range l.Annotations {
		if strings.HasPrefix(key, processor.AnnotationPrefix) {
			desc.Annotations[key] = value
		}
	}
	return desc
}

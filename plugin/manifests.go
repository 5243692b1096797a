package plugin

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containers/ocicrypt/config"
	"github.com/opencontainers/go-digest"
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
func (d *Differ) layerKey(ctx context.Context, dc *config.DecryptConfig, desc ocispec.Descriptor) (*processor.LayerKey, error) {
	if processor.HasRecipients(desc) {
		return d.unwrapOne(ctx, dc, desc)
	}
	found, err := d.describedBy(ctx, desc)
	switch {
	case err != nil:
		return nil, err
	case len(found) == 1:
		return d.unwrapOne(ctx, dc, found[0])
	}
	// Anybody who can have an image pulled can add a manifest, and put the key
	// of another layer in it. So a key has to fit the layer's HMAC.
	verified := 0
	return d.keys.UnwrapAny(ctx, d.conf.UnwrapTimeout, dc, found, func(key *processor.LayerKey) (bool, error) {
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
func (d *Differ) unwrapOne(ctx context.Context, dc *config.DecryptConfig, desc ocispec.Descriptor) (*processor.LayerKey, error) {
	ctx, cancel := context.WithTimeout(ctx, d.conf.UnwrapTimeout)
	defer cancel()
	key, err := d.keys.Unwrap(ctx, dc, desc)
	if err != nil && !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, processor.ErrNoKey) {
		err = fmt.Errorf("%w: %w", errUnwrap, err)
	}
	return key, err
}

// describedBy returns desc once with each different set of key annotations that
// the manifests of the context's namespace have for the layer, at least one. If no
// manifest names the layer, those count that did when a layer beside it was searched.
// Other namespaces are not searched: they may be other tenants'.
func (d *Differ) describedBy(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	blobs, err := possibleManifests(ctx, d.store, desc.Digest)
	if err != nil {
		return nil, err
	}
	namespace, _ := namespaces.Namespace(ctx)
	var found []ocispec.Descriptor
	without := 0 // manifests that name the layer without its key
	bytesLeft := int64(maxBlobBytes)
	for i, info := range blobs {
		if bytesLeft -= info.Size; bytesLeft < 0 || i == maxBlobs || len(found) == maxDescriptors {
			logrus.WithFields(logrus.Fields{"digest": desc.Digest, "read": i, "of": len(blobs)}).Warn("not all manifests that may name the layer were read")
			break
		}
		layers, err := layersBeside(ctx, d.store, info, desc.Digest)
		if err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			logrus.WithError(err).WithField("digest", info.Digest).Debug("blob is not read as a manifest")
			continue
		}
		for _, l := range layers {
			hasKeys := processor.HasRecipients(l)
			if hasKeys {
				d.siblings.add(namespace, l)
			}
			if l.Digest != desc.Digest {
				continue
			}
			if !hasKeys {
				without++
				continue
			}
			l = withKeysOf(desc, l)
			if len(found) < maxDescriptors && !slices.ContainsFunc(found, func(f ocispec.Descriptor) bool { return maps.Equal(f.Annotations, l.Annotations) }) {
				found = append(found, l)
			}
		}
	}
	if len(found) == 0 && without == 0 {
		found = d.siblings.of(namespace, desc)
	}
	if len(found) > 0 {
		return found, nil
	}
	if without > 0 {
		return nil, fmt.Errorf("%w: neither the layer's descriptor nor a manifest in namespace %s has its key: "+
			"the image was built on an encrypted one and lost the key on the way; put it back with \"ctr-pilot images encrypt --keys-from BASE\"", processor.ErrNoKey, namespace)
	}
	return nil, fmt.Errorf("%[1]w: the layer's descriptor has no key annotations, and no manifest in namespace %[2]s names the layer: "+
		"pull the image that it belongs to into that namespace, such as by \"ctr-pilot --namespace %[2]s images pull IMAGE\"", processor.ErrNoKey, namespace)
}

// possibleManifests returns the blobs that may be manifests of the layer, those
// first that refer to it by containerd's labels for garbage collection, then
// those that came from the same repository, each the newest first. BuildKit sets
// no labels of the first kind.
func possibleManifests(ctx context.Context, store content.Store, layer digest.Digest) ([]content.Info, error) {
	own, err := store.Info(ctx, layer)
	if err != nil {
		return nil, err
	}
	var referring, near []content.Info
	err = store.Walk(ctx, func(info content.Info) error {
		switch {
		case info.Size > maxManifest || info.Digest == layer:
		case refersTo(info.Labels, layer):
			referring = append(referring, info)
		case sameSource(info.Labels, own.Labels):
			near = append(near, info)
		}
		return nil
	})
	newestFirst := func(a, b content.Info) int {
		return cmp.Or(b.CreatedAt.Compare(a.CreatedAt), cmp.Compare(a.Digest, b.Digest))
	}
	slices.SortFunc(referring, newestFirst)
	slices.SortFunc(near, newestFirst)
	return append(referring, near...), err
}

func refersTo(labels map[string]string, layer digest.Digest) bool {
	for key, value := range labels {
		if strings.HasPrefix(key, gcContentLabel) && value == layer.String() {
			return true
		}
	}
	return false
}

// sameSource reports whether two blobs came from one repository. A label names
// a registry, and its value the repositories with commas between them.
func sameSource(a, b map[string]string) bool {
	for key, repositories := range a {
		if !strings.HasPrefix(key, sourceLabel) || b[key] == "" {
			continue
		}
		others := strings.Split(b[key], ",")
		for r := range strings.SplitSeq(repositories, ",") {
			if slices.Contains(others, r) {
				return true
			}
		}
	}
	return false
}

// layersBeside returns the encrypted layers of a manifest that names the layer, or
// none if the blob is something else.
func layersBeside(ctx context.Context, store content.Store, info content.Info, layer digest.Digest) ([]ocispec.Descriptor, error) {
	ra, err := store.ReaderAt(ctx, ocispec.Descriptor{Digest: info.Digest, Size: info.Size})
	if err != nil {
		return nil, err
	}
	defer ra.Close()
	doc := make([]byte, info.Size)
	if _, err := io.ReadFull(content.NewReader(ra), doc); err != nil {
		return nil, err
	}
	if !bytes.Contains(doc, []byte(layer.Encoded())) {
		return nil, nil
	}
	var manifest ocispec.Manifest
	if err := json.Unmarshal(doc, &manifest); err != nil {
		return nil, err
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

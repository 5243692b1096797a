package processor

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"github.com/containers/ocicrypt/config"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// EncryptLayer encrypts a layer of that media type for the recipients in ec, in
// memory, and returns the encrypted layer and its descriptor. Of one that is not
// small, use [NewEncrypter].
func EncryptLayer(ctx context.Context, layer []byte, mediaType string, ec *config.EncryptConfig) ([]byte, ocispec.Descriptor, error) {
	var desc ocispec.Descriptor
	var ok bool
	if desc.MediaType, ok = EncryptedMediaType(mediaType); !ok {
		return nil, desc, fmt.Errorf("media type %s can't be encrypted", mediaType)
	}
	key := NewLayerKey(digest.FromBytes(layer))
	defer key.Clear()
	var err error
	if desc.Annotations, err = key.Wrap(ctx, ec, nil); err != nil {
		return nil, desc, err
	}
	r, err := NewEncrypter(bytes.NewReader(layer), key)
	if err != nil {
		return nil, desc, err
	}
	encrypted, err := io.ReadAll(r)
	if err != nil {
		return nil, desc, err
	}
	name, value, err := key.PublicOptions()
	if err != nil {
		return nil, desc, err
	}
	desc.Annotations[name] = value
	desc.Digest, desc.Size = digest.FromBytes(encrypted), int64(len(encrypted))
	return encrypted, desc, nil
}

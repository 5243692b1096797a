package image

import (
	"crypto/hmac"
	"encoding/base64"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// layerSealAnnotation, on an encrypted layer, shows to those who have the layer key that
// the blob and its HMAC are those which were made with it. Without it they would have to
// read the blob. Only [Options.Like] needs it.
const layerSealAnnotation = processor.AnnotationPrefix + "pilot.seal"

// layerSeal seals the digest of an encrypted layer's blob and the annotation with its
// HMAC.
func layerSeal(key *processor.LayerKey, blob digest.Digest, public string) []byte {
	return sealOf(key.Derive("pilot image encrypted layer"), []byte(blob.String()+" "+public))
}

// isSealed reports whether key, which was unwrapped from an encrypted layer, has sealed
// its blob and its HMAC.
func isSealed(key *processor.LayerKey, l ocispec.Descriptor) bool {
	_, public, err := key.PublicOptions()
	if err != nil {
		return false
	}
	sum, err := base64.StdEncoding.DecodeString(l.Annotations[layerSealAnnotation])
	return err == nil && hmac.Equal(sum, layerSeal(key, l.Digest, public))
}

// annotationsOf returns the annotations, except those of recipients, of a layer that was
// encrypted with key into a blob.
func annotationsOf(key *processor.LayerKey, blob digest.Digest) (map[string]string, error) {
	name, public, err := key.PublicOptions()
	if err != nil {
		return nil, err
	}
	return map[string]string{name: public, layerSealAnnotation: base64.StdEncoding.EncodeToString(layerSeal(key, blob, public))}, nil
}

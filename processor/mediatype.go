package processor

import (
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// encryptedSuffix marks the media type of an encrypted layer.
const encryptedSuffix = "+encrypted"

// mediaTypeWasm is the layer of an image that holds a WebAssembly module.
const mediaTypeWasm = "application/vnd.wasm.content.layer.v1+wasm"

// encryptable maps the media type of a layer that can be encrypted to its OCI
// name. Nondistributable (foreign) layers are not in it: whoever publishes
// them hands them out in plain.
var encryptable = map[string]string{
	ocispec.MediaTypeImageLayer:                         ocispec.MediaTypeImageLayer,
	ocispec.MediaTypeImageLayerGzip:                     ocispec.MediaTypeImageLayerGzip,
	ocispec.MediaTypeImageLayerZstd:                     ocispec.MediaTypeImageLayerZstd,
	mediaTypeWasm:                                       mediaTypeWasm,
	"application/vnd.docker.image.rootfs.diff.tar":      ocispec.MediaTypeImageLayer,
	"application/vnd.docker.image.rootfs.diff.tar.gzip": ocispec.MediaTypeImageLayerGzip,
	"application/vnd.docker.image.rootfs.diff.tar.zstd": ocispec.MediaTypeImageLayerZstd,
}

// EncryptedMediaType returns the media type that a layer of media type mt has
// once it is encrypted: the OCI name of mt followed by "+encrypted". It reports
// false when layers of that type are not encrypted: nondistributable ones,
// encrypted ones, and what is not a layer.
func EncryptedMediaType(mt string) (string, bool) {
	oci, ok := encryptable[mt]
	if !ok {
		return "", false
	}
	return oci + encryptedSuffix, true
}

// PlainMediaType returns the media type that an encrypted layer of media type
// mt has once it is decrypted, and false when mt is not that of an encrypted
// layer.
func PlainMediaType(mt string) (string, bool) {
	plain, ok := strings.CutSuffix(mt, encryptedSuffix)
	if !ok {
		return "", false
	}
	switch plain {
	case ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd, mediaTypeWasm,
		// Deprecated, but images have them.
		"application/vnd.oci.image.layer.nondistributable.v1.tar",
		"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
		"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd":
		return plain, true
	}
	return "", false
}

// IsEncrypted reports whether mt is the media type of an encrypted layer.
func IsEncrypted(mt string) bool {
	_, ok := PlainMediaType(mt)
	return ok
}

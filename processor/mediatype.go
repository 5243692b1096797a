package processor

import (
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// encryptedSuffix marks the media type of an encrypted layer.
const encryptedSuffix = "+encrypted"

// ociTypes maps the media types of layers to those that their encrypted form
// names. Docker manifests can't have encrypted layers, so Docker's types become
// the OCI's. An encrypted foreign (nondistributable) layer is a plain layer's
// type: clients don't push blobs of the foreign types, and expect them at the
// publisher's URLs, where the encrypted blob is not.
var ociTypes = map[string]string{
	"application/vnd.docker.image.rootfs.diff.tar":                 ocispec.MediaTypeImageLayer,
	"application/vnd.docker.image.rootfs.diff.tar.gzip":            ocispec.MediaTypeImageLayerGzip,
	"application/vnd.docker.image.rootfs.diff.tar.zstd":            ocispec.MediaTypeImageLayerZstd,
	"application/vnd.docker.image.rootfs.foreign.diff.tar":         ocispec.MediaTypeImageLayer,
	"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":    ocispec.MediaTypeImageLayerGzip,
	"application/vnd.oci.image.layer.nondistributable.v1.tar":      ocispec.MediaTypeImageLayer,
	"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": ocispec.MediaTypeImageLayerGzip,
	"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": ocispec.MediaTypeImageLayerZstd,
}

// EncryptedMediaType returns the media type that a blob of media type mt has once
// it is encrypted: mt, or its OCI name, followed by "+encrypted". Any blob can be
// encrypted. It reports false if mt is empty or ends with "+encrypted".
func EncryptedMediaType(mt string) (string, bool) {
	if mt == "" || strings.HasSuffix(mt, encryptedSuffix) {
		return "", false
	}
	if oci, ok := ociTypes[mt]; ok {
		mt = oci
	}
	return mt + encryptedSuffix, true
}

// PlainMediaType returns the media type that an encrypted blob of media type mt
// has once it is decrypted, and false if mt is not that of an encrypted blob.
func PlainMediaType(mt string) (string, bool) {
	plain, ok := strings.CutSuffix(mt, encryptedSuffix)
	// Nothing is encrypted twice. What decrypts a stream relies on that.
	if !ok || plain == "" || strings.HasSuffix(plain, encryptedSuffix) {
		return "", false
	}
	return plain, true
}

// IsEncrypted reports whether mt is the media type of an encrypted blob.
func IsEncrypted(mt string) bool {
	_, ok := PlainMediaType(mt)
	return ok
}

package image

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/jsonedit"
	"github.com/ctrlplane/pilot/processor"
)

// dockerTypes are Docker's media types and the OCI's for the same thing.
var dockerTypes = map[string]string{
	images.MediaTypeDockerSchema2ManifestList:     ocispec.MediaTypeImageIndex,
	images.MediaTypeDockerSchema2Manifest:         ocispec.MediaTypeImageManifest,
	images.MediaTypeDockerSchema2Config:           ocispec.MediaTypeImageConfig,
	images.MediaTypeDockerSchema2Layer:            ocispec.MediaTypeImageLayer,
	images.MediaTypeDockerSchema2LayerGzip:        ocispec.MediaTypeImageLayerGzip,
	images.MediaTypeDockerSchema2LayerZstd:        ocispec.MediaTypeImageLayerZstd,
	images.MediaTypeDockerSchema2LayerForeign:     "application/vnd.oci.image.layer.nondistributable.v1.tar",
	images.MediaTypeDockerSchema2LayerForeignGzip: "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
}

// encrypted edits the descriptor of something that was encrypted, and notes what
// decrypting can't derive.
func (e *edit) encrypted(element []byte, c change, at string, notes restore) ([]byte, error) {
	var had ocispec.Descriptor
	if err := json.Unmarshal(element, &had); err != nil {
		return nil, err
	}
	element, err := e.redescribed(element, c.desc, at, notes)
	if err != nil || e.list != "layers" {
		return element, err
	}
	if i := slices.IndexFunc(had.URLs, strangeURL); i >= 0 {
		return nil, fmt.Errorf("%s has the URL %q, which decrypting would not put back: only https:// and http:// URLs without user and fragment can be put back", at, had.URLs[i])
	}
	if len(had.URLs) > 0 {
		// The plain layer is there, and containerd would look there first.
		element, err = jsonedit.Edit(element, "urls", func(text []byte) ([]byte, error) {
			notes.note(at+"/urls", text)
			return []byte("[]"), nil
		})
		if err != nil {
			return nil, err
		}
	}
	annotations, err := jsonedit.Get(element, "annotations")
	if err != nil {
		return nil, err
	}
	if annotations != nil && !processor.IsEncrypted(had.MediaType) {
		left, err := jsonedit.Remove(orEmpty(annotations), ofEncryption)
		if err != nil {
			return nil, err
		}
		switch {
		case string(left) != string(orEmpty(annotations)): // another encryption's
			notes.seal(c.sealKey, at, annotations)
		case len(had.Annotations) == 0:
			notes.note(at+"/annotations", annotations)
		}
		annotations = left
	}
	return setAnnotations(element, annotations, c.annotations)
}

// redescribed returns the descriptor element with the media type, digest and size of
// desc. When encrypting, it notes what decrypting can't derive. The descriptor's data,
// if it has any, becomes empty.
func (e *edit) redescribed(element []byte, desc ocispec.Descriptor, at string, notes restore) ([]byte, error) {
	var had ocispec.Descriptor
	if err := json.Unmarshal(element, &had); err != nil {
		return nil, err
	}
	if e.mode != encrypting {
		if len(had.Data) > 0 {
			// It is content that the descriptor no longer describes.
			var err error
			if element, err = jsonedit.Set(element, "data", []byte(`""`)); err != nil {
				return nil, err
			}
		}
		now, err := setDescriptor(element, had, desc)
		if err != nil {
			return nil, err
		}
		// Its escapes may be those of the plain document already: of a manifest that
		// was decrypted before its subject.
		spelled, err := jsonedit.Get(element, "digest")
		if err != nil || spelled == nil {
			return now, err
		}
		return jsonedit.Set(now, "digest", jsonedit.QuoteLike(spelled, desc.Digest.String()))
	}
	text, err := jsonedit.Get(element, "mediaType")
	if err != nil {
		return nil, err
	}
	plain, encrypted := processor.PlainMediaType(desc.MediaType)
	if text != nil && (string(text) != string(jsonedit.Quote(had.MediaType)) || encrypted && had.MediaType != desc.MediaType && had.MediaType != plain) {
		notes.note(at+"/mediaType", text)
	}
	if text, err = jsonedit.Get(element, "digest"); err != nil {
		return nil, err
	}
	if text != nil && string(text) != string(jsonedit.Quote(had.Digest.String())) {
		mask, err := jsonedit.Spelling(text)
		if err != nil {
			return nil, err
		}
		notes.note(at+"/digest", jsonedit.Quote(mask))
	}
	if len(had.Data) > 0 {
		text, err := jsonedit.Get(element, "data")
		if err != nil {
			return nil, err
		}
		if inlined(had) == nil || string(text) != string(dataText(had.Data)) {
			return nil, errData(had)
		}
		notes.note(at+"/data", []byte("true"))
		if element, err = jsonedit.Set(element, "data", []byte(`""`)); err != nil {
			return nil, err
		}
	}
	return setDescriptor(element, had, desc)
}

// dataText returns content as the data of a descriptor holds it.
func dataText(content []byte) []byte {
	return jsonedit.Quote(base64.StdEncoding.EncodeToString(content))
}

// errData is the error of a descriptor whose data is not the content that it describes,
// or is in an unusual base64, so that it can't be restored.
func errData(desc ocispec.Descriptor) error {
	return fmt.Errorf("the descriptor of %s has data that is not its content in base64: it would stay readable, so remove it first", desc.Digest)
}

// rewrapped edits the descriptor of a layer that has other recipients, or of a
// manifest of such layers.
func (e *edit) rewrapped(element []byte, c change) ([]byte, error) {
	if e.list != "layers" {
		return e.redescribed(element, c.desc, "", nil)
	}
	annotations, err := jsonedit.Get(element, "annotations")
	if err != nil {
		return nil, err
	}
	added := maps.Clone(c.annotations)
	annotations, err = jsonedit.Remove(orEmpty(annotations), func(key string) bool {
		value, ok := c.annotations[key]
		if ok && value == "" {
			delete(added, key)
			return true
		}
		return false
	})
	if err != nil {
		return nil, err
	}
	return setAnnotations(element, annotations, added)
}

// decrypted edits the descriptor of something that was decrypted.
func (e *edit) decrypted(element []byte, c change, at string, notes restore) ([]byte, error) {
	element, err := e.redescribed(element, c.desc, at, notes)
	if err != nil || e.list != "layers" {
		return element, err
	}
	if element, err = removeAnnotations(element, ofEncryption, notes[at+"/annotations"] == ""); err != nil {
		return nil, err
	}
	return notes.unseal(c.sealKey, at, element)
}

// setDescriptor sets the media type, digest and size of doc where they change.
func setDescriptor(doc []byte, had, desc ocispec.Descriptor) (_ []byte, err error) {
	if had.MediaType != desc.MediaType {
		if doc, err = jsonedit.Set(doc, "mediaType", jsonedit.Quote(desc.MediaType)); err != nil {
			return nil, err
		}
	}
	if had.Digest != desc.Digest {
		if doc, err = jsonedit.Set(doc, "digest", jsonedit.Quote(desc.Digest.String())); err != nil {
			return nil, err
		}
	}
	if had.Size != desc.Size {
		return jsonedit.Set(doc, "size", strconv.AppendInt(nil, desc.Size, 10))
	}
	return doc, nil
}

// ofEncryption reports whether an annotation describes how a layer is encrypted.
func ofEncryption(key string) bool { return strings.HasPrefix(key, processor.AnnotationPrefix) }

// orEmpty returns the text of an object, an empty one where had is null or nil.
func orEmpty(had []byte) []byte {
	if had == nil || string(had) == "null" {
		return []byte("{}")
	}
	return had
}

// setAnnotations adds annotations to those that doc has.
func setAnnotations(doc, had []byte, add map[string]string) (_ []byte, err error) {
	had = orEmpty(had)
	for _, key := range slices.Sorted(maps.Keys(add)) {
		if had, err = jsonedit.Set(had, key, jsonedit.Quote(add[key])); err != nil {
			return nil, err
		}
	}
	return jsonedit.Set(doc, "annotations", had)
}

// removeAnnotations removes annotations from doc, and the member annotations if none is
// left and whole is true.
func removeAnnotations(doc []byte, drop func(key string) bool, whole bool) ([]byte, error) {
	had, err := jsonedit.Get(doc, "annotations")
	if err != nil || had == nil || string(had) == "null" {
		return doc, err
	}
	left, err := jsonedit.Remove(had, drop)
	if err != nil {
		return nil, err
	}
	var rest map[string]json.RawMessage
	if whole && json.Unmarshal(left, &rest) == nil && len(rest) == 0 {
		return jsonedit.Remove(doc, func(key string) bool { return key == "annotations" })
	}
	return jsonedit.Set(doc, "annotations", left)
}

// convert turns doc's mediaType from Docker's into the OCI's, noting the former.
func convert(doc []byte, at string, notes restore) ([]byte, error) {
	text, err := jsonedit.Get(doc, "mediaType")
	if err != nil || text == nil {
		return doc, err
	}
	oci, ok := dockerTypes[jsonedit.Unquote(text)]
	if !ok {
		return doc, nil
	}
	notes.note(at+"/mediaType", text)
	return jsonedit.Set(doc, "mediaType", jsonedit.Quote(oci))
}

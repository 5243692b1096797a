package image

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/jsonedit"
	"github.com/ctrlplane/pilot/processor"
)

// attestationAnnotation, on an entry of an index, holds the digest of the
// manifest that the entry makes a statement about, as BuildKit writes it.
const attestationAnnotation = "vnd.docker.reference.digest"

// attestationTypeAnnotation, on an entry of an index, says that it is an
// attestation, as BuildKit writes it.
const attestationTypeAnnotation = "vnd.docker.reference.type"

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

// edit is how a manifest or an index changes.
type edit struct {
	list    string                                   // the key of the array whose elements change: layers or manifests
	changes map[int]change                           // by index into it
	removed []int                                    // indexes into it, in order, of elements to leave out
	renamed map[digest.Digest]ocispec.Descriptor     // what attestations refer to
	subject *ocispec.Descriptor                      // what took the place of the subject, if anything did
	content func(ocispec.Descriptor) ([]byte, error) // reads a small blob
	mode    mode
	plain   []string // digests of entries of an index that are known not to be encrypted
	nested  bool     // another index refers to it
	// done says that no encrypted layer is left after decrypting, and fresh
	// that there was none before encrypting: in the whole image, for an index.
	done, fresh bool
	// was says that something below an index is encrypted, or was until now. If it
	// was not, there may be a subject that was, and nothing to restore.
	was bool
}

// change is how a descriptor changes. Its other members stay.
type change struct {
	desc        ocispec.Descriptor // MediaType, Digest and Size
	annotations map[string]string  // to set, or to remove where empty
	none        bool               // nothing changes
	// sealKey is derived from the layer key, if the layer is encrypted or decrypted.
	sealKey []byte
}

// apply returns doc edited and its new media type; mediaType is that which it
// has.
func (e *edit) apply(doc []byte, mediaType string) ([]byte, string, error) {
	if err := unambiguous(doc); err != nil {
		return nil, "", err
	}
	notes, err := restoreOf(doc)
	if err != nil {
		return nil, "", err
	}
	if e.mode == encrypting && e.fresh || notes == nil {
		notes = make(restore) // there may be one of a tool that does not know it
	}
	array, err := jsonedit.Get(doc, e.list)
	if err != nil {
		return nil, "", err
	}
	array, err = jsonedit.MapElements(array, func(i int, element []byte) ([]byte, error) {
		at := "/" + e.list + "/" + strconv.Itoa(i)
		edited, err := e.element(i, element, at, notes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", at, err)
		}
		return edited, nil
	})
	if err != nil {
		return nil, "", err
	}
	if array, err = notes.removeElements(array, e.list, e.removed); err != nil {
		return nil, "", err
	}
	if doc, err = jsonedit.Set(doc, e.list, array); err != nil {
		return nil, "", err
	}
	if e.subject != nil {
		doc, err = jsonedit.Edit(doc, "subject", func(subject []byte) ([]byte, error) {
			if err := unambiguous(subject); err != nil {
				return nil, err
			}
			return e.redescribed(subject, *e.subject, "/subject", notes)
		})
		if err != nil {
			return nil, "", fmt.Errorf("/subject: %w", err)
		}
	}
	switch {
	case e.mode == decrypting && e.done:
		return notes.apply(doc, mediaType, e.list, e.content)
	case e.mode == decrypting && (e.was || len(notes) > 0) && e.notePlain(notes):
		doc, err = notes.write(doc)
		return doc, mediaType, err
	case e.mode != encrypting:
		return doc, mediaType, nil
	}

	if doc, err = convert(doc, "", notes); err != nil {
		return nil, "", err
	}
	if oci, ok := dockerTypes[mediaType]; ok {
		if notes["/mediaType"] == "" {
			return nil, "", errors.New("a Docker manifest has a mediaType, and this has none")
		}
		mediaType = oci
	}
	doc, err = jsonedit.Edit(doc, "config", func(config []byte) ([]byte, error) {
		if err := unambiguous(config); err != nil {
			return nil, err
		}
		return convert(config, "/config", notes)
	})
	if err != nil {
		return nil, "", err
	}
	e.notePlain(notes)
	doc, err = notes.write(doc)
	return doc, mediaType, err
}

// notePlain notes which entries are not encrypted, and reports whether it did: it
// matters if there is something to restore, which may be in the index around it.
func (e *edit) notePlain(notes restore) bool {
	delete(notes, plainKey) // of entries that are encrypted now
	if len(e.plain) == 0 || len(notes) == 0 && !e.nested {
		return false
	}
	notes[plainKey] = strings.Join(e.plain, " ")
	return true
}

// element edits one element of the list.
func (e *edit) element(i int, element []byte, at string, notes restore) (_ []byte, err error) {
	if err := unambiguous(element); err != nil {
		return nil, err
	}
	c, changes := e.changes[i]
	switch {
	case changes && e.mode == encrypting:
		element, err = e.encrypted(element, c, at, notes)
	case changes && e.mode == decrypting:
		element, err = e.decrypted(element, c, at, notes)
	case changes:
		element, err = e.rewrapped(element, c)
	case e.mode == encrypting && e.list == "layers":
		element, err = convert(element, at, notes)
	}
	if err != nil {
		return nil, err
	}
	return e.follow(i, element, at, notes)
}

// encrypted edits the descriptor of something that was encrypted, noting what
// can't be derived of what it was.
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
		return nil, fmt.Errorf("%s has the URL %q, which decrypting would not put back: only https:// and http:// URLs without user and fragment can be kept", at, had.URLs[i])
	}
	if len(had.URLs) > 0 {
		// There the layer is in plain, and containerd would look there first.
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

// redescribed returns the descriptor element with the media type, digest and size
// of what it is to describe, noting what it had that can't be derived, if it was
// encrypted. The content that it may hold becomes empty.
func (e *edit) redescribed(element []byte, desc ocispec.Descriptor, at string, notes restore) ([]byte, error) {
	var had ocispec.Descriptor
	if err := json.Unmarshal(element, &had); err != nil {
		return nil, err
	}
	if e.mode != encrypting {
		if len(had.Data) > 0 {
			// That of what it no longer describes.
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

// errData is the error of a descriptor that holds other content in its data than
// what it describes, or in other words than usual, so that it can't be restored.
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

// follow makes entry i, if it is an attestation, refer to the manifest that took the
// place of the one that it refers to.
func (e *edit) follow(i int, element []byte, at string, notes restore) ([]byte, error) {
	if len(e.renamed) == 0 {
		return element, nil
	}
	var desc ocispec.Descriptor
	if err := json.Unmarshal(element, &desc); err != nil {
		return nil, err
	}
	to, ok := e.renamed[digest.Digest(desc.Annotations[attestationAnnotation])]
	if !ok {
		return element, nil
	}
	if slices.Contains(e.removed, i) && !e.changesTo(to.Digest) {
		return nil, fmt.Errorf("the attestation %s is about %s in another index, and can't be left out, since decrypting would not put that back: keep it, or remove it first", desc.Digest, desc.Annotations[attestationAnnotation])
	}
	annotations, err := jsonedit.Get(element, "annotations")
	if err != nil {
		return nil, err
	}
	had, err := jsonedit.Get(annotations, attestationAnnotation)
	if err != nil {
		return nil, err
	}
	if e.mode == encrypting && string(had) != string(jsonedit.Quote(jsonedit.Unquote(had))) {
		mask, err := jsonedit.Spelling(had)
		if err != nil {
			return nil, err
		}
		notes.note(at+"/annotations/"+attestationAnnotation, jsonedit.Quote(mask))
	}
	now := jsonedit.Quote(to.Digest.String())
	if e.mode != encrypting {
		now = jsonedit.QuoteLike(had, to.Digest.String())
	}
	if annotations, err = jsonedit.Set(annotations, attestationAnnotation, now); err != nil {
		return nil, err
	}
	return jsonedit.Set(element, "annotations", annotations)
}

// changesTo reports whether an element of the list becomes one of that digest.
func (e *edit) changesTo(d digest.Digest) bool {
	for _, c := range e.changes {
		if c.desc.Digest == d {
			return true
		}
	}
	return false
}

// ofEncryption reports whether an annotation is one of those that say how a
// layer is encrypted.
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

// removeAnnotations removes annotations of doc's, and the member that holds
// them if none is left and whole says so.
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

// gcLabels are the labels that keep containerd's garbage collector from what a
// document refers to.
func gcLabels(children []ocispec.Descriptor) map[string]string {
	labels := make(map[string]string)
	count := make(map[string]int)
	for _, child := range children {
		for _, key := range images.ChildGCLabels(child) {
			if strings.HasSuffix(key, ".") {
				n := count[key]
				count[key]++
				key += strconv.Itoa(n)
			}
			labels[key] = child.Digest.String()
		}
	}
	return labels
}

package image

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// restoreAnnotation, on a manifest or an index, says what decrypting can't
// derive of the document that was encrypted: a JSON object of JSON pointers
// (RFC 6901) into it and the values that they had. A Docker image has its
// media types there. It has the prefix of the encryption's other annotations
// so that whatever removes those removes it.
const restoreAnnotation = processor.AnnotationPrefix + "pilot.restore"

// attestationAnnotation, on an entry of an index, holds the digest of the
// manifest that the entry makes a statement about, as BuildKit writes it.
const attestationAnnotation = "vnd.docker.reference.digest"

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
	list    string                          // the key of the array whose elements change: layers or manifests
	changes map[int]change                  // by index into it
	renamed map[digest.Digest]digest.Digest // what attestations refer to
	// decrypting removes the annotations of encryption from what changes;
	// done says that no encrypted layer is left then, and fresh that there
	// was none before.
	decrypting, done, fresh bool
}

// change is how a descriptor changes. Its other members stay.
type change struct {
	desc        ocispec.Descriptor // MediaType, Digest and Size
	annotations map[string]string  // to set
}

// apply returns doc edited and its new media type; mediaType is that which it
// has.
func (e *edit) apply(doc []byte, mediaType string) ([]byte, string, error) {
	restore, err := restoreOf(doc)
	if err != nil {
		return nil, "", err
	}
	if !e.decrypting && e.fresh {
		restore = nil // left over by a tool that does not know it
	}
	if restore == nil {
		restore = make(map[string]json.RawMessage)
	}
	array, err := get(doc, e.list)
	if err != nil {
		return nil, "", err
	}
	array, err = mapElements(array, func(i int, element []byte) ([]byte, error) {
		at := "/" + e.list + "/" + strconv.Itoa(i)
		if c, ok := e.changes[i]; ok {
			if element, err = e.descriptor(element, c, at, restore); err != nil {
				return nil, fmt.Errorf("%s: %w", at, err)
			}
		} else if !e.decrypting && e.list == "layers" {
			if element, err = convert(element, at, restore); err != nil {
				return nil, fmt.Errorf("%s: %w", at, err)
			}
		}
		return e.follow(element)
	})
	if err != nil {
		return nil, "", err
	}
	if doc, err = set(doc, e.list, array); err != nil {
		return nil, "", err
	}
	if e.decrypting {
		if !e.done {
			return doc, mediaType, nil
		}
		return applyRestore(doc, mediaType, restore)
	}

	if doc, err = convert(doc, "", restore); err != nil {
		return nil, "", err
	}
	if oci, ok := dockerTypes[mediaType]; ok {
		if restore["/mediaType"] == nil {
			return nil, "", fmt.Errorf("a Docker manifest has a mediaType, and this has none")
		}
		mediaType = oci
	}
	if c, err := get(doc, "config"); err != nil {
		return nil, "", err
	} else if c != nil {
		if c, err = convert(c, "/config", restore); err != nil {
			return nil, "", err
		}
		if doc, err = set(doc, "config", c); err != nil {
			return nil, "", err
		}
	}
	if doc, err = setRestore(doc, restore); err != nil {
		return nil, "", err
	}
	return doc, mediaType, nil
}

// descriptor edits one descriptor, noting in restore what can't be derived.
func (e *edit) descriptor(element []byte, c change, at string, restore map[string]json.RawMessage) ([]byte, error) {
	var had ocispec.Descriptor
	if err := json.Unmarshal(element, &had); err != nil {
		return nil, err
	}
	if !e.decrypting && e.list == "layers" {
		if len(had.Data) > 0 {
			return nil, fmt.Errorf("layer %s stands in the manifest itself (data), where it would stay readable: remove that first", had.Digest)
		}
		if dockerTypes[had.MediaType] != "" {
			restore[at+"/mediaType"] = quote(had.MediaType)
		}
	}
	var err error
	for _, m := range []struct {
		key      string
		had, has string
		text     []byte
	}{
		{"mediaType", had.MediaType, c.desc.MediaType, quote(c.desc.MediaType)},
		{"digest", had.Digest.String(), c.desc.Digest.String(), quote(c.desc.Digest.String())},
		{"size", strconv.FormatInt(had.Size, 10), strconv.FormatInt(c.desc.Size, 10), strconv.AppendInt(nil, c.desc.Size, 10)},
	} {
		if m.had == m.has {
			continue
		}
		if element, err = set(element, m.key, m.text); err != nil {
			return nil, err
		}
	}
	if e.list != "layers" {
		return element, nil
	}

	annotations, err := get(element, "annotations")
	if err != nil {
		return nil, err
	}
	if e.decrypting {
		return stripAnnotations(element, annotations, restore[at+"/annotations"] == nil)
	}
	if annotations != nil && len(had.Annotations) == 0 {
		restore[at+"/annotations"] = bytes.Clone(annotations)
	}
	return setAnnotations(element, annotations, c.annotations)
}

// follow makes the entry of an attestation refer to the manifest that took the
// place of the one that it refers to.
func (e *edit) follow(element []byte) ([]byte, error) {
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
	annotations, err := get(element, "annotations")
	if err != nil {
		return nil, err
	}
	return setAnnotations(element, annotations, map[string]string{attestationAnnotation: to.String()})
}

// setAnnotations adds annotations to those that doc has.
func setAnnotations(doc, had []byte, add map[string]string) ([]byte, error) {
	if len(add) == 0 {
		return doc, nil
	}
	if had == nil || string(had) == "null" {
		had = []byte("{}")
	}
	var err error
	for _, key := range slices.Sorted(maps.Keys(add)) {
		if had, err = set(had, key, quote(add[key])); err != nil {
			return nil, err
		}
	}
	return set(doc, "annotations", had)
}

// stripAnnotations removes what [processor.AnnotationPrefix] begins from had,
// the annotations of doc, and all of them if none is left and whole says so.
func stripAnnotations(doc, had []byte, whole bool) ([]byte, error) {
	if had == nil || string(had) == "null" {
		return doc, nil
	}
	left, err := remove(had, func(key string) bool { return strings.HasPrefix(key, processor.AnnotationPrefix) })
	if err != nil {
		return nil, err
	}
	if whole {
		if list, err := members(left); err == nil && len(list) == 0 {
			return remove(doc, func(key string) bool { return key == "annotations" })
		}
	}
	return set(doc, "annotations", left)
}

// convert turns doc's mediaType from Docker's into the OCI's, noting the former
// in restore.
func convert(doc []byte, at string, restore map[string]json.RawMessage) ([]byte, error) {
	text, err := get(doc, "mediaType")
	if err != nil || text == nil {
		return doc, err
	}
	var mediaType string
	if err := json.Unmarshal(text, &mediaType); err != nil {
		return nil, err
	}
	oci, ok := dockerTypes[mediaType]
	if !ok {
		return doc, nil
	}
	restore[at+"/mediaType"] = bytes.Clone(text)
	return set(doc, "mediaType", quote(oci))
}

// restoreOf returns what doc's restore annotation says, as far as it may say
// it: the annotation is anybody's input.
func restoreOf(doc []byte) (map[string]json.RawMessage, error) {
	annotations, err := get(doc, "annotations")
	if err != nil || annotations == nil || string(annotations) == "null" {
		return nil, err
	}
	text, err := get(annotations, restoreAnnotation)
	if err != nil || text == nil {
		return nil, err
	}
	var value string
	var restore map[string]json.RawMessage
	if json.Unmarshal(text, &value) != nil || json.Unmarshal([]byte(value), &restore) != nil {
		return nil, fmt.Errorf("annotation %s is damaged", restoreAnnotation)
	}
	for at, v := range restore {
		if !restorable(at, v) {
			return nil, fmt.Errorf("annotation %s names %.80q, which it can't", restoreAnnotation, at)
		}
	}
	return restore, nil
}

// restorable reports whether the restore annotation may give the place at the
// value v: a media type of Docker's, or annotations that are empty.
func restorable(at string, v json.RawMessage) bool {
	parts := strings.Split(at, "/")
	isLayer := len(parts) == 4 && parts[1] == "layers"
	if isLayer {
		if n, err := strconv.Atoi(parts[2]); err != nil || strconv.Itoa(n) != parts[2] || n < 0 {
			return false
		}
	} else if at != "/mediaType" && at != "/config/mediaType" && at != "/annotations" {
		return false
	}
	if parts[0] != "" {
		return false
	}
	switch parts[len(parts)-1] {
	case "mediaType":
		var mediaType string
		return json.Unmarshal(v, &mediaType) == nil && dockerTypes[mediaType] != ""
	case "annotations":
		var annotations map[string]string
		return json.Unmarshal(v, &annotations) == nil && len(annotations) == 0
	}
	return false
}

// setRestore sets doc's restore annotation, or removes it if there is nothing
// to say.
func setRestore(doc []byte, restore map[string]json.RawMessage) ([]byte, error) {
	annotations, err := get(doc, "annotations")
	if err != nil {
		return nil, err
	}
	if len(restore) == 0 {
		return dropRestore(doc, annotations, true)
	}
	if annotations != nil {
		var had map[string]string
		if err := json.Unmarshal(annotations, &had); err != nil {
			return nil, err
		}
		if len(had) == 0 {
			restore["/annotations"] = bytes.Clone(annotations)
		}
	}
	value, err := json.Marshal(restore)
	if err != nil {
		return nil, err
	}
	return setAnnotations(doc, annotations, map[string]string{restoreAnnotation: string(value)})
}

// dropRestore removes the restore annotation from doc's annotations, and all
// of them if none is left and whole says so.
func dropRestore(doc, annotations []byte, whole bool) ([]byte, error) {
	if annotations == nil || string(annotations) == "null" {
		return doc, nil
	}
	if text, err := get(annotations, restoreAnnotation); err != nil || text == nil {
		return doc, err
	}
	return stripAnnotations(doc, annotations, whole)
}

// applyRestore undoes the conversion from Docker. It returns doc and its media
// type.
func applyRestore(doc []byte, mediaType string, restore map[string]json.RawMessage) ([]byte, string, error) {
	annotations, err := get(doc, "annotations")
	if err != nil {
		return nil, "", err
	}
	if doc, err = dropRestore(doc, annotations, restore["/annotations"] == nil); err != nil {
		return nil, "", err
	}
	if v := restore["/annotations"]; v != nil && string(v) == "null" {
		if doc, err = set(doc, "annotations", v); err != nil {
			return nil, "", err
		}
	}
	if v := restore["/mediaType"]; v != nil {
		if doc, err = set(doc, "mediaType", v); err != nil {
			return nil, "", err
		}
		if err := json.Unmarshal(v, &mediaType); err != nil {
			return nil, "", err
		}
	}
	if v := restore["/config/mediaType"]; v != nil {
		config, err := get(doc, "config")
		if err != nil {
			return nil, "", err
		}
		if config, err = set(config, "mediaType", v); err != nil {
			return nil, "", err
		}
		if doc, err = set(doc, "config", config); err != nil {
			return nil, "", err
		}
	}
	layers, err := get(doc, "layers")
	if err != nil || layers == nil {
		return doc, mediaType, err
	}
	layers, err = mapElements(layers, func(i int, element []byte) ([]byte, error) {
		at := "/layers/" + strconv.Itoa(i)
		var err error
		if v := restore[at+"/mediaType"]; v != nil {
			if element, err = set(element, "mediaType", v); err != nil {
				return nil, err
			}
		}
		if v := restore[at+"/annotations"]; v != nil && string(v) == "null" {
			return set(element, "annotations", v)
		}
		return element, nil
	})
	if err != nil {
		return nil, "", err
	}
	doc, err = set(doc, "layers", layers)
	return doc, mediaType, err
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

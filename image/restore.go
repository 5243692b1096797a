package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/jsonedit"
	"github.com/ctrlplane/pilot/processor"
)

// restoreAnnotation, on a manifest or an index, holds what decrypting can't
// derive of the document that was encrypted. It has the prefix of the
// encryption's other annotations so that whatever removes those removes it.
const restoreAnnotation = processor.AnnotationPrefix + "pilot.restore"

// restore is what restoreAnnotation holds, as a JSON object of strings: JSON
// pointers (RFC 6901) into the document, and the JSON text that stood there: a
// media type of Docker's or of a foreign layer's or an unusual spelling of one,
// annotations that are empty, URLs. Annotations that another encryption left on a
// layer are sealed. Of a digest it holds how it was spelled, and of data that it was
// there, so that it helps nobody to find or to read the plain blob.
type restore map[string]string

// plainKey is the key in restore of a list of digests, with spaces between
// them: the entries of an index that were not encrypted when it was. One of
// them that is not here later can't hold encrypted layers.
const plainKey = "plain"

// note notes the text at a place, unless there is a note already: an image may be
// encrypted in several steps.
func (r restore) note(at string, text []byte) {
	if r[at] == "" {
		r[at] = string(text)
	}
}

// restoreOf returns what is in doc's annotation, or nil. The annotation is untrusted, as
// the whole document is.
func restoreOf(doc []byte) (restore, error) {
	annotations, err := jsonedit.Get(doc, "annotations")
	if err != nil || annotations == nil || string(annotations) == "null" {
		return nil, err
	}
	text, err := jsonedit.Get(annotations, restoreAnnotation)
	if err != nil || text == nil {
		return nil, err
	}
	var r restore
	if json.Unmarshal([]byte(jsonedit.Unquote(text)), &r) != nil || r == nil {
		return nil, fmt.Errorf("annotation %s is damaged", restoreAnnotation)
	}
	return r, nil
}

// plain returns the digests under plainKey.
func (r restore) plain() []string { return strings.Fields(r[plainKey]) }

// write sets doc's annotation, or removes it if there are no notes.
func (r restore) write(doc []byte) ([]byte, error) {
	if len(r) == 0 {
		return dropRestore(doc, true)
	}
	annotations, err := jsonedit.Get(doc, "annotations")
	if err != nil {
		return nil, err
	}
	if annotations != nil {
		var had map[string]string
		if err := json.Unmarshal(annotations, &had); err != nil {
			return nil, err
		}
		if len(had) == 0 {
			r.note("/annotations", annotations)
		}
	}
	value, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	return setAnnotations(doc, annotations, map[string]string{restoreAnnotation: string(value)})
}

// dropRestore removes the annotation from doc's.
func dropRestore(doc []byte, whole bool) ([]byte, error) {
	annotations, err := jsonedit.Get(doc, "annotations")
	if err != nil || annotations == nil || string(annotations) == "null" {
		return doc, err
	}
	if text, err := jsonedit.Get(annotations, restoreAnnotation); err != nil || text == nil {
		return doc, err
	}
	return removeAnnotations(doc, func(key string) bool { return key == restoreAnnotation }, whole)
}

// apply gives doc back what it had, where that still fits, and returns it with
// its media type.
func (r restore) apply(doc []byte, mediaType, list string, content func(ocispec.Descriptor) ([]byte, error)) (_ []byte, _ string, err error) {
	if doc, err = dropRestore(doc, r["/annotations"] == ""); err != nil {
		return nil, "", err
	}
	if doc, err = r.replace(doc, "/annotations"); err != nil {
		return nil, "", err
	}
	if doc, err = r.replace(doc, "/mediaType"); err != nil {
		return nil, "", err
	}
	if text, err := jsonedit.Get(doc, "mediaType"); err != nil {
		return nil, "", err
	} else if docker := jsonedit.Unquote(text); dockerTypes[docker] == mediaType {
		mediaType = docker
	}
	doc, err = jsonedit.Edit(doc, "config", func(config []byte) ([]byte, error) { return r.replace(config, "/config/mediaType") })
	if err != nil {
		return nil, "", err
	}
	doc, err = jsonedit.Edit(doc, list, func(array []byte) ([]byte, error) {
		array, err := jsonedit.MapElements(array, func(i int, element []byte) ([]byte, error) {
			return r.descriptor(element, "/"+list+"/"+strconv.Itoa(i), content)
		})
		if err != nil || list != "manifests" {
			return array, err
		}
		return r.restoreElements(array)
	})
	if err != nil {
		return nil, "", err
	}
	doc, err = jsonedit.Edit(doc, "subject", func(subject []byte) ([]byte, error) { return r.descriptor(subject, "/subject", content) })
	return doc, mediaType, err
}

// descriptor gives a descriptor back what it had.
func (r restore) descriptor(doc []byte, at string, content func(ocispec.Descriptor) ([]byte, error)) (_ []byte, err error) {
	for _, key := range []string{"/mediaType", "/digest", "/annotations", "/urls"} {
		if doc, err = r.replace(doc, at+key); err != nil {
			return nil, fmt.Errorf("%s: %w", at, err)
		}
	}
	if mask := r[at+"/annotations/"+attestationAnnotation]; mask != "" {
		doc, err = jsonedit.Edit(doc, "annotations", func(annotations []byte) ([]byte, error) {
			return jsonedit.Edit(annotations, attestationAnnotation, func(text []byte) ([]byte, error) {
				return jsonedit.QuoteAs(jsonedit.Unquote(text), jsonedit.Unquote([]byte(mask))), nil
			})
		})
		if err != nil {
			return nil, fmt.Errorf("%s: %w", at, err)
		}
	}
	if r[at+"/data"] == "" {
		return doc, nil
	}
	if text, err := jsonedit.Get(doc, "data"); err != nil || string(text) != `""` {
		return doc, err
	}
	var desc ocispec.Descriptor
	if err := json.Unmarshal(doc, &desc); err != nil {
		return nil, fmt.Errorf("%s: %w", at, err)
	}
	desc.Data = nil
	data, err := content(desc)
	if err != nil {
		return nil, fmt.Errorf("%s/data: %w", at, err)
	}
	return jsonedit.Set(doc, "data", dataText(data))
}

// replace puts back the text that a member of doc had, if it means the same as the text
// that is there now.
func (r restore) replace(doc []byte, at string) ([]byte, error) {
	text := r[at]
	if text == "" || jsonedit.CheckDistinct([]byte(text)) != nil {
		return doc, nil
	}
	key := at[strings.LastIndex(at, "/")+1:]
	has, err := jsonedit.Get(doc, key)
	if err != nil || has == nil {
		return doc, err
	}
	if mask := jsonedit.Unquote([]byte(text)); key == "digest" && !strings.Contains(mask, ":") {
		text = string(jsonedit.QuoteAs(jsonedit.Unquote(has), mask))
	}
	if !same(key, []byte(text), has) {
		return doc, nil
	}
	return jsonedit.Set(doc, key, []byte(text))
}

// same reports whether the text that a member of a document or a descriptor had means
// the same as the text that it has, except for encryption. Annotations of another
// encryption have to be there already: [restore.unseal] puts them back.
func same(key string, had, has []byte) bool {
	switch key {
	case "mediaType":
		had, has := jsonedit.Unquote(had), jsonedit.Unquote(has)
		encrypted, _ := processor.EncryptedMediaType(had)
		plain, _ := processor.PlainMediaType(encrypted)
		return had != "" && (had == has || !processor.IsEncrypted(had) && (dockerTypes[had] == has || plain == has))
	case "digest":
		return jsonedit.Unquote(had) != "" && jsonedit.Unquote(had) == jsonedit.Unquote(has)
	case "urls":
		var was, is []string
		return json.Unmarshal(had, &was) == nil && json.Unmarshal(has, &is) == nil && len(is) == 0 && !slices.ContainsFunc(was, strangeURL)
	case "annotations":
		var was, is map[string]string
		if json.Unmarshal(had, &was) != nil || json.Unmarshal(has, &is) != nil {
			return false
		}
		return maps.Equal(was, is)
	}
	return false
}

// strangeURL reports whether this is not a URL that the layers of registries have, from
// which clients would fetch them.
func strangeURL(text string) bool {
	u, err := url.Parse(text)
	return err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil || u.Fragment != ""
}

// checkRestored returns an error for a descriptor that was noted as part of a plain image
// and that no plain image has.
func checkRestored(doc []byte) error {
	if err := errors.Join(jsonedit.CheckDistinct(doc), unambiguous(doc)); err != nil {
		return err
	}
	var desc ocispec.Descriptor
	if err := json.Unmarshal(doc, &desc); err != nil {
		return err
	}
	if desc.Size < 0 || processor.IsEncrypted(desc.MediaType) {
		return fmt.Errorf("%d bytes of %s", desc.Size, desc.MediaType)
	}
	for key := range desc.Annotations {
		if ofEncryption(key) {
			return fmt.Errorf("annotation %s", key)
		}
	}
	if i := slices.IndexFunc(desc.URLs, strangeURL); i >= 0 {
		return fmt.Errorf("URL %q", desc.URLs[i])
	}
	return nil
}

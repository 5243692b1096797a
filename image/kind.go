package image

import (
	"encoding/json"
	"fmt"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/jsonedit"
)

// kind is what a document is by its members.
type kind int

const (
	noKind kind = iota
	manifestKind
	indexKind
	bothKinds
)

func kindOf(doc []byte) (kind, error) {
	var has struct{ Config, Layers, Manifests json.RawMessage }
	if err := json.Unmarshal(doc, &has); err != nil {
		return noKind, err
	}
	switch isManifest := has.Config != nil || has.Layers != nil; {
	case isManifest && has.Manifests != nil:
		return bothKinds, nil
	case isManifest:
		return manifestKind, nil
	case has.Manifests != nil:
		return indexKind, nil
	}
	return noKind, nil
}

// addUnlike reports a document that is not of the kind in its descriptor. Readers that
// go by its members find blobs in it that others do not.
func (w *work) addUnlike(desc ocispec.Descriptor, doc []byte) {
	if w.mode != encrypting && (w.mode != inspecting || !w.selectsPlatform(desc.Platform)) {
		return
	}
	want := manifestKind
	if isIndex(desc.MediaType) {
		want = indexKind
	}
	if is, err := kindOf(doc); err != nil || is != want {
		w.addPlain(desc, desc, desc.Platform, ReasonNotImage)
	}
}

// ourKeys are the keys that this package reads.
var ourKeys = []string{"mediaType", "config", "layers", "manifests", "digest", "size", "annotations", "data", "urls", "subject"}

// unambiguous refuses a document or descriptor in which readers may not agree on
// which member counts, since encoding/json ignores the case of keys.
func unambiguous(doc []byte) error { return jsonedit.CheckKeys(doc, ourKeys) }

// oneReading refuses a document in which readers may find different descriptors.
func oneReading(doc []byte) error {
	if err := unambiguous(doc); err != nil {
		return err
	}
	for _, key := range []string{"config", "subject"} {
		value, err := jsonedit.Get(doc, key)
		if err == nil && value != nil && string(value) != "null" {
			err = unambiguous(value)
		}
		if err != nil {
			return fmt.Errorf("/%s: %w", key, err)
		}
	}
	for _, key := range []string{"layers", "manifests"} {
		array, err := jsonedit.Get(doc, key)
		if err == nil && array != nil && string(array) != "null" {
			_, err = jsonedit.MapElements(array, func(i int, element []byte) ([]byte, error) {
				if err := unambiguous(element); err != nil {
					return nil, fmt.Errorf("%d: %w", i, err)
				}
				return nil, nil
			})
		}
		if err != nil {
			return fmt.Errorf("/%s: %w", key, err)
		}
	}
	return nil
}

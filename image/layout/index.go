package layout

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Find returns the image of that name in the content of an index.json.
func Find(index []byte, name string) (ocispec.Descriptor, error) {
	var list ocispec.Index
	if err := json.Unmarshal(index, &list); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("index.json: %w", err)
	}
	only := ocispec.Index{Manifests: imagesOf(list)}
	if name == "" {
		switch len(only.Manifests) {
		case 0:
			return ocispec.Descriptor{}, fmt.Errorf("it has no images: %w", errdefs.ErrNotFound)
		case 1:
			return bare(only.Manifests[0]), nil
		}
		named := allNames(only)
		if len(named) == 0 {
			return ocispec.Descriptor{}, fmt.Errorf("it has %d images, and none has a name", len(only.Manifests))
		}
		err := fmt.Errorf("it has %d images: name one of %s", len(only.Manifests), strings.Join(names(only), ", "))
		if rest := len(only.Manifests) - len(named); rest > 0 {
			err = fmt.Errorf("%w (%d without a name)", err, rest)
		}
		return ocispec.Descriptor{}, err
	}
	var found []ocispec.Descriptor
	for _, d := range list.Manifests {
		if hasName(d, name) {
			if !slices.ContainsFunc(found, func(f ocispec.Descriptor) bool { return f.Digest == d.Digest }) {
				found = append(found, d)
			}
		}
	}
	switch len(found) {
	case 0:
		if all := names(only); len(all) > 0 {
			return ocispec.Descriptor{}, fmt.Errorf("it has no image %q, only %s: %w", name, strings.Join(all, ", "), errdefs.ErrNotFound)
		}
		return ocispec.Descriptor{}, fmt.Errorf("it has no image %q: %w", name, errdefs.ErrNotFound)
	case 1:
		return bare(found[0]), nil
	}
	return ocispec.Descriptor{}, fmt.Errorf("it has %d images %q", len(found), name)
}

// bare returns a descriptor without what the index says of the name.
func bare(d ocispec.Descriptor) ocispec.Descriptor {
	d.Annotations = nil
	return d
}

// maxNames is how many names an error shows.
const maxNames = 10

func names(index ocispec.Index) []string {
	all := allNames(index)
	if len(all) > maxNames {
		all = append(all[:maxNames], "…")
	}
	return all
}

// Names returns the names of the images in the content of an index.json.
func Names(index []byte) ([]string, error) {
	var list ocispec.Index
	if err := json.Unmarshal(index, &list); err != nil {
		return nil, fmt.Errorf("index.json: %w", err)
	}
	return allNames(list), nil
}

func allNames(index ocispec.Index) (all []string) {
	for _, d := range index.Manifests {
		if name := d.Annotations[ocispec.AnnotationRefName]; name != "" {
			all = append(all, name)
		}
	}
	return all
}

// WithImage returns the content of an index.json in which name stands for desc. An empty
// name adds an image without one.
func WithImage(index []byte, desc ocispec.Descriptor, name string) ([]byte, error) {
	return withImage(index, desc, name, "")
}

// withImage does that. With an empty name, desc takes the place and the name of the image
// that it replaces, if that is not empty.
func withImage(index []byte, desc ocispec.Descriptor, name string, replaces digest.Digest) ([]byte, error) {
	doc := map[string]json.RawMessage{"schemaVersion": json.RawMessage("2"), "mediaType": json.RawMessage(`"` + ocispec.MediaTypeImageIndex + `"`)}
	if len(index) > 0 {
		doc = nil
		if err := json.Unmarshal(index, &doc); err != nil {
			return nil, fmt.Errorf("index.json: %w", err)
		}
	}
	var entries []entry
	if raw := doc["manifests"]; len(raw) > 0 {
		if err := json.Unmarshal(raw, &entries); err != nil {
			return nil, fmt.Errorf("index.json: manifests: %w", err)
		}
	}
	desc.Annotations = nil
	if name != "" {
		desc.Annotations = map[string]string{ocispec.AnnotationRefName: name}
	}
	list := make([]*entry, 0, len(entries)+1)
	var released digest.Digest // the image of "cosign save" that desc replaces
	for i := range entries {
		e := &entries[i]
		_, named := e.Annotations[ocispec.AnnotationRefName]
		switch {
		case name != "" && hasName(e.Descriptor, name), name == "" && replaces != "" && e.Digest == replaces:
			desc.Annotations = namesOf(e.Descriptor, desc.Digest)
			if isSavedImage(e.Descriptor) && e.Digest != desc.Digest {
				released = e.Digest
			}
		case named || name != "" || e.Digest != desc.Digest:
			list = append(list, e)
		}
	}
	if released != "" {
		if err := release(list, released); err != nil {
			return nil, err
		}
	}
	added, err := newEntry(desc)
	if err != nil {
		return nil, err
	}
	if list = append(list, added); !cosignTag.MatchString(name) {
		if err := mark(list, added); err != nil {
			return nil, err
		}
	}
	if doc["manifests"], err = json.Marshal(list); err != nil {
		return nil, err
	}
	return json.Marshal(doc)
}

// entry is an entry of an index.json, of which unknown fields are kept.
type entry struct {
	ocispec.Descriptor
	raw json.RawMessage
}

func newEntry(desc ocispec.Descriptor) (*entry, error) {
	raw, err := json.Marshal(desc)
	return &entry{desc, raw}, err
}

func (e *entry) UnmarshalJSON(b []byte) error {
	e.raw = slices.Clone(b)
	return json.Unmarshal(b, &e.Descriptor)
}

func (e *entry) MarshalJSON() ([]byte, error) { return e.raw, nil }

// annotate sets annotations, or removes those that are empty.
func (e *entry) annotate(set map[string]string) error {
	var doc map[string]json.RawMessage
	if err := json.Unmarshal(e.raw, &doc); err != nil {
		return err
	}
	all := maps.Clone(e.Annotations)
	if all == nil {
		all = map[string]string{}
	}
	maps.Copy(all, set)
	maps.DeleteFunc(all, func(_, value string) bool { return value == "" })
	var err error
	if doc["annotations"], err = json.Marshal(all); err != nil {
		return err
	}
	e.Annotations = all
	e.raw, err = json.Marshal(doc)
	return err
}

// hasName reports whether an entry has a name, as containerd spells it or as others do.
func hasName(d ocispec.Descriptor, name string) bool {
	return d.Annotations[ocispec.AnnotationRefName] == name || d.Annotations[images.AnnotationImageName] == name
}

// namesOf returns the annotations that name an entry, and its kind if it stays the same
// image.
func namesOf(d ocispec.Descriptor, now digest.Digest) map[string]string {
	keys := []string{ocispec.AnnotationRefName, images.AnnotationImageName}
	if d.Digest == now {
		keys = append(keys, kindAnnotation)
	}
	var a map[string]string
	for _, key := range keys {
		if name, ok := d.Annotations[key]; ok {
			if a == nil {
				a = map[string]string{}
			}
			a[key] = name
		}
	}
	return a
}

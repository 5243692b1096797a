package layout

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Find returns the image of that name in the content of an index.json.
func Find(index []byte, name string) (ocispec.Descriptor, error) {
	var list ocispec.Index
	if err := json.Unmarshal(index, &list); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("index.json: %w", err)
	}
	if name == "" {
		switch len(list.Manifests) {
		case 0:
			return ocispec.Descriptor{}, fmt.Errorf("it has no images: %w", errdefs.ErrNotFound)
		case 1:
			return bare(list.Manifests[0]), nil
		}
		named := allNames(list)
		if len(named) == 0 {
			return ocispec.Descriptor{}, fmt.Errorf("it has %d images, and none has a name", len(list.Manifests))
		}
		err := fmt.Errorf("it has %d images: name one of %s", len(list.Manifests), strings.Join(names(list), ", "))
		if rest := len(list.Manifests) - len(named); rest > 0 {
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
		if all := names(list); len(all) > 0 {
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
	return withImage(index, desc, name, false)
}

// withImage does that. With only, desc gets the name that the only image has.
func withImage(index []byte, desc ocispec.Descriptor, name string, only bool) ([]byte, error) {
	doc := map[string]json.RawMessage{"schemaVersion": json.RawMessage("2"), "mediaType": json.RawMessage(`"` + ocispec.MediaTypeImageIndex + `"`)}
	if len(index) > 0 {
		doc = nil
		if err := json.Unmarshal(index, &doc); err != nil {
			return nil, fmt.Errorf("index.json: %w", err)
		}
	}
	var entries []json.RawMessage
	if raw := doc["manifests"]; len(raw) > 0 {
		if err := json.Unmarshal(raw, &entries); err != nil {
			return nil, fmt.Errorf("index.json: manifests: %w", err)
		}
	}
	desc.Annotations = nil
	if name != "" {
		desc.Annotations = map[string]string{ocispec.AnnotationRefName: name}
	}
	list := make([]json.RawMessage, 0, len(entries)+1)
	for _, e := range entries {
		var d ocispec.Descriptor
		if err := json.Unmarshal(e, &d); err != nil {
			return nil, fmt.Errorf("index.json: %w", err)
		}
		_, named := d.Annotations[ocispec.AnnotationRefName]
		switch {
		case only || name != "" && hasName(d, name):
			desc.Annotations = namesOf(d)
		case named || name != "" || d.Digest != desc.Digest:
			list = append(list, e)
		}
	}
	entry, err := json.Marshal(desc)
	if err != nil {
		return nil, err
	}
	if doc["manifests"], err = json.Marshal(append(list, entry)); err != nil {
		return nil, err
	}
	return json.Marshal(doc)
}

// hasName reports whether an entry has a name, as containerd spells it or as others do.
func hasName(d ocispec.Descriptor, name string) bool {
	return d.Annotations[ocispec.AnnotationRefName] == name || d.Annotations[images.AnnotationImageName] == name
}

// namesOf returns the annotations that name an entry.
func namesOf(d ocispec.Descriptor) map[string]string {
	var a map[string]string
	for _, key := range []string{ocispec.AnnotationRefName, images.AnnotationImageName} {
		if name, ok := d.Annotations[key]; ok {
			if a == nil {
				a = map[string]string{}
			}
			a[key] = name
		}
	}
	return a
}

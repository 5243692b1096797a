package layout

import (
	"regexp"
	"slices"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// cosign finds what is about an image by its tag in a registry. In a layout it takes the
// first entry of each kind, which is an annotation, and none of them has a name:
// https://github.com/sigstore/cosign/blob/v2.4.0/pkg/oci/layout/index.go.
const (
	kindAnnotation = "kind"
	kinds          = "dev.cosignproject.cosign/"
	kindImage      = kinds + "image"
	kindIndex      = kinds + "imageIndex"
)

// kindOf has the kinds of what is about an image, by the suffix of its tag.
var kindOf = map[string]string{"sig": kinds + "sigs", "att": kinds + "atts"}

// cosignTag matches the tags that cosign gives to what is about a manifest.
var cosignTag = regexp.MustCompile(`^(sha256)-([0-9a-f]{64})\.([A-Za-z0-9_-]{1,32})$`)

// parseCosignTag returns the manifest that such a tag is about, and its suffix.
func parseCosignTag(tag string) (subject digest.Digest, suffix string) {
	if m := cosignTag.FindStringSubmatch(tag); m != nil {
		return digest.Digest(m[1] + ":" + m[2]), m[3]
	}
	return "", ""
}

// cosignTagOf returns the tag that an entry has in a registry if it is about a manifest:
// its name, or what its kind says with the image of "cosign save". Others have none.
func cosignTagOf(e ocispec.Descriptor, saved digest.Digest) string {
	if name := e.Annotations[ocispec.AnnotationRefName]; cosignTag.MatchString(name) {
		return name
	}
	for suffix, kind := range kindOf {
		if saved != "" && e.Annotations[kindAnnotation] == kind {
			return saved.Algorithm().String() + "-" + saved.Encoded() + "." + suffix
		}
	}
	return ""
}

// savedImage returns the image of "cosign save", or nothing.
func savedImage(entries []ocispec.Descriptor) digest.Digest {
	for _, e := range entries {
		if isSavedImage(e) {
			return e.Digest
		}
	}
	return ""
}

func isSavedImage(e ocispec.Descriptor) bool {
	kind := e.Annotations[kindAnnotation]
	return kind == kindImage || kind == kindIndex
}

// imagesOf returns the entries of an index.json that are not cosign's about others, or all
// if there are none.
func imagesOf(list ocispec.Index) []ocispec.Descriptor {
	saved := savedImage(list.Manifests)
	only := slices.DeleteFunc(slices.Clone(list.Manifests), func(e ocispec.Descriptor) bool { return cosignTagOf(e, saved) != "" })
	if len(only) == 0 {
		return list.Manifests
	}
	return only
}

// release names what is about the image of "cosign save", which is going to be another, as
// in a registry.
func release(entries []*entry, saved digest.Digest) error {
	for _, e := range entries {
		if tag := cosignTagOf(e.Descriptor, saved); tag != "" {
			if err := e.annotate(map[string]string{ocispec.AnnotationRefName: tag, kindAnnotation: ""}); err != nil {
				return err
			}
		}
	}
	return nil
}

// mark has cosign find an image and what is about it, unless it finds another image.
func mark(entries []*entry, image *entry) error {
	kind := kindImage
	if images.IsIndexType(image.MediaType) {
		kind = kindIndex
	}
	if slices.ContainsFunc(entries, func(e *entry) bool { return isSavedImage(e.Descriptor) && e.Digest != image.Digest }) {
		return nil
	}
	marked := map[string]bool{}
	for _, e := range entries {
		subject, suffix := parseCosignTag(e.Annotations[ocispec.AnnotationRefName])
		if about := kindOf[suffix]; subject == image.Digest && about != "" && !marked[about] {
			marked[about] = true
			if err := e.annotate(map[string]string{kindAnnotation: about}); err != nil {
				return err
			}
		}
	}
	if len(marked) == 0 {
		return nil
	}
	return image.annotate(map[string]string{kindAnnotation: kind})
}

package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxPages is how many pages of a list of referrers are read.
const maxPages = 100

// Referrer is something that is about a manifest: a signature, an SBOM.
type Referrer struct {
	ocispec.Descriptor
	// Type is its artifact type, or what its tag says: sig, att or sbom.
	Type string
	// Tag is the tag that says what it is about, as cosign's do, or empty if its manifest
	// says so.
	Tag string
}

// CosignSuffixes end the tags under which cosign keeps what is about a manifest.
var CosignSuffixes = []string{"sig", "att", "sbom"}

// ReferrersTag returns the tag that stands for a manifest's referrers in a registry that
// can't list them, and before a dot and a suffix for what cosign keeps about it:
// https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#referrers-tag-schema.
func ReferrersTag(d digest.Digest) string { return strings.Replace(d.String(), ":", "-", 1) }

// Referrers lists what is about a manifest: what the registry's referrers API lists, or its
// referrers tag, and what cosign keeps under tags. With an error it returns those that it
// found.
func (r *Repository) Referrers(ctx context.Context, d digest.Digest) ([]Referrer, error) {
	ctx, cancel := context.WithTimeout(ctx, requestWithin)
	defer cancel()
	var list []Referrer
	found, err := r.listed(ctx, d)
	for _, desc := range found {
		list = append(list, Referrer{Descriptor: desc, Type: desc.ArtifactType})
	}
	if err != nil {
		return list, err
	}
	for _, suffix := range CosignSuffixes {
		tag := ReferrersTag(d) + "." + suffix
		desc, err := r.lookUp(ctx, r.spec.Locator+":"+tag)
		if err == nil {
			list = append(list, Referrer{desc, suffix, tag})
		} else if !errdefs.IsNotFound(err) {
			return list, err
		}
	}
	return list, nil
}

// listed lists what the registry's referrers API lists, on all of its pages, or its referrers
// tag, if it has no such API. containerd's client reads the first page, and takes an API that
// fails for an empty list.
func (r *Repository) listed(ctx context.Context, d digest.Digest) (list []ocispec.Descriptor, err error) {
	if ctx, err = docker.ContextWithRepositoryScope(ctx, r.spec, false); err != nil || r.referrers == nil {
		return nil, err
	}
	query := url.Values{}
	for range maxPages {
		page, err := r.referrers.page(ctx, attempts, query, "referrers", d.String())
		if errdefs.IsNotFound(err) && list == nil {
			index, err := r.referrersIndex(ctx, ReferrersTag(d))
			return index.Manifests, err
		}
		if err != nil {
			return list, err
		}
		var index ocispec.Index
		if err := json.Unmarshal(page.Content, &index); err != nil {
			return list, fmt.Errorf("the list of referrers: %w", err)
		}
		if list = append(list, index.Manifests...); page.Next == nil {
			return list, nil
		}
		query = page.Next
	}
	return list, fmt.Errorf("%s lists the referrers of %s on more than %d pages", r.referrers.Host, d, maxPages)
}

// PushReferrer pushes the manifest of a referrer of subject, whose blobs are there, so that
// it is found again. A registry that does not look into manifests gets an entry in the
// subject's referrers tag.
func (r *Repository) PushReferrer(ctx context.Context, from content.Provider, ref Referrer, subject digest.Digest) error {
	if ref.Tag != "" {
		return r.Push(ctx, from, ref.Descriptor, ref.Tag)
	}
	resp, err := r.put(ctx, from, ref.Descriptor, ref.Digest.String())
	if err != nil || resp.Header.Get("OCI-Subject") != "" {
		return err
	}
	entry, err := referrerEntry(ctx, from, ref.Descriptor)
	if err != nil {
		return err
	}
	return r.addReferrer(ctx, entry, ReferrersTag(subject))
}

// addReferrer adds an entry to the index under a referrers tag. No registry can compare and
// replace a tag, so a client that has read the index before this one replaced it takes the
// entry out again. The index is read once more after a pause, in which such a client is done.
func (r *Repository) addReferrer(ctx context.Context, entry ocispec.Descriptor, tag string) error {
	for n := 1; ; n++ {
		index, err := r.referrersIndex(ctx, tag)
		if err != nil {
			return fmt.Errorf("read the referrers under %s: %w", tag, err)
		}
		if slices.ContainsFunc(index.Manifests, func(d ocispec.Descriptor) bool { return d.Digest == entry.Digest }) {
			return nil
		}
		if n > attempts {
			return fmt.Errorf("other clients replaced the referrers under %s %d times meanwhile: try again", tag, attempts)
		}
		index.Manifests = append(index.Manifests, entry)
		doc, err := json.Marshal(index)
		if err != nil {
			return err
		}
		desc := ocispec.Descriptor{MediaType: index.MediaType, Digest: digest.FromBytes(doc), Size: int64(len(doc))}
		if err := r.Push(ctx, document{index.MediaType, doc}, desc, tag); err != nil {
			return err
		}
		if err := pause(ctx, n, nil); err != nil {
			return err
		}
	}
}

// referrerEntry returns the entry of a referrer in a list: its descriptor with what its
// manifest says of its type, and its annotations.
func referrerEntry(ctx context.Context, from content.Provider, desc ocispec.Descriptor) (ocispec.Descriptor, error) {
	doc, err := content.ReadBlob(ctx, from, desc)
	if err != nil {
		return desc, err
	}
	var m struct {
		ArtifactType string             `json:"artifactType"`
		Config       ocispec.Descriptor `json:"config"`
		Annotations  map[string]string  `json:"annotations"`
	}
	if err := json.Unmarshal(doc, &m); err != nil {
		return desc, fmt.Errorf("%s: %w", desc.Digest, err)
	}
	desc.ArtifactType, desc.Annotations = m.ArtifactType, m.Annotations
	if desc.ArtifactType == "" {
		desc.ArtifactType = m.Config.MediaType
	}
	return desc, nil
}

// referrersIndex returns the index under a referrers tag, or an empty one.
func (r *Repository) referrersIndex(ctx context.Context, tag string) (ocispec.Index, error) {
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	desc, err := r.lookUp(ctx, r.spec.Locator+":"+tag)
	if errdefs.IsNotFound(err) {
		return index, nil
	}
	if err != nil {
		return index, err
	}
	doc, err := content.ReadBlob(ctx, r, desc)
	if err == nil {
		err = json.Unmarshal(doc, &index)
	}
	if err == nil && index.MediaType != ocispec.MediaTypeImageIndex {
		err = fmt.Errorf("it is a %.100q and not an index", index.MediaType)
	}
	return index, err
}

// ReaderAt returns a reader of the document, whatever the descriptor.
func (d document) ReaderAt(context.Context, ocispec.Descriptor) (content.ReaderAt, error) {
	return memory{bytes.NewReader(d.content)}, nil
}

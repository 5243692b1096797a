package layout

import (
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// cosignKind is the annotation with which "cosign save" says what an entry is.
	cosignKind = "kind"
	// cosignKinds begins its values, such as dev.cosignproject.cosign/sigs.
	cosignKinds = "dev.cosignproject.cosign/"
	// maxReferrer bounds a manifest that is read to see what it is about, in bytes.
	maxReferrer = 4 << 20
)

// Referrer is an entry of index.json that is about a manifest: a signature, an SBOM.
type Referrer struct {
	ocispec.Descriptor
	// Subject is the digest of what it is about.
	Subject digest.Digest
	// Type is its artifact type, or what its name or its annotation says, such as sig.
	Type string
	// Name is the entry's, if that says what it is about.
	Name string
}

// Referrers lists the entries that are about a manifest.
func (l *Layout) Referrers(ctx context.Context) ([]Referrer, error) {
	b, err := l.index()
	if err != nil || b == nil {
		return nil, err
	}
	return Referrers(ctx, b, l)
}

// cosignTag matches the names that cosign gives to what is about a manifest.
var cosignTag = regexp.MustCompile(`^(sha256)-([0-9a-f]{64})\.([A-Za-z0-9_-]{1,32})$`)

// Referrers lists the entries of an index.json that are about a manifest: those whose
// manifests have a subject, those with a name that cosign would give them in a registry,
// and those that "cosign save" put beside its image.
func Referrers(ctx context.Context, index []byte, blobs content.Provider) ([]Referrer, error) {
	var list ocispec.Index
	if err := json.Unmarshal(index, &list); err != nil {
		return nil, fmt.Errorf("index.json: %w", err)
	}
	var saved digest.Digest // the image of "cosign save"
	for _, e := range list.Manifests {
		if kind := e.Annotations[cosignKind]; kind == cosignKinds+"image" || kind == cosignKinds+"imageIndex" {
			saved = e.Digest
		}
	}
	var found []Referrer
	for _, e := range list.Manifests {
		name := e.Annotations[ocispec.AnnotationRefName]
		kind, ofCosign := strings.CutPrefix(e.Annotations[cosignKind], cosignKinds)
		if m := cosignTag.FindStringSubmatch(name); m != nil {
			found = append(found, Referrer{bare(e), digest.Digest(m[1] + ":" + m[2]), m[3], name})
			continue
		}
		if ofCosign && saved != "" && e.Digest != saved {
			found = append(found, Referrer{bare(e), saved, kind, ""})
			continue
		}
		if !images.IsManifestType(e.MediaType) || e.Size > maxReferrer {
			continue
		}
		artifact, subject, err := subjectOf(ctx, blobs, e)
		if err != nil {
			return found, err
		}
		if subject != "" {
			found = append(found, Referrer{bare(e), subject, artifact, ""})
		}
	}
	return found, nil
}

// subjectOf returns the artifact type of a manifest and what it is about, or nothing.
func subjectOf(ctx context.Context, blobs content.Provider, desc ocispec.Descriptor) (artifact string, subject digest.Digest, err error) {
	doc, err := content.ReadBlob(ctx, blobs, bare(desc))
	if errdefs.IsNotFound(err) {
		return "", "", nil
	}
	if err != nil {
		return "", "", err
	}
	var m struct {
		ArtifactType string              `json:"artifactType"`
		Config       ocispec.Descriptor  `json:"config"`
		Subject      *ocispec.Descriptor `json:"subject"`
	}
	if json.Unmarshal(doc, &m) != nil || m.Subject == nil {
		return "", "", nil
	}
	if m.ArtifactType == "" {
		m.ArtifactType = m.Config.MediaType
	}
	return m.ArtifactType, m.Subject.Digest, nil
}

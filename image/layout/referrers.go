package layout

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxReferrer bounds a manifest that is read to see what it is about, in bytes.
const maxReferrer = 4 << 20

// Referrer is an entry of index.json that is about a manifest: a signature, an SBOM.
type Referrer struct {
	ocispec.Descriptor
	// Subject is the digest of what it is about.
	Subject digest.Digest
	// Type is its artifact type, or what its name or its annotation says, such as sig.
	Type string
	// Name is what cosign would call it in a registry, or empty if its manifest says what
	// it is about.
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

// Referrers lists the entries of an index.json that are about a manifest: those whose
// manifests have a subject, those with a name that cosign would give them in a registry,
// and those that "cosign save" put beside its image.
func Referrers(ctx context.Context, index []byte, blobs content.Provider) ([]Referrer, error) {
	var list ocispec.Index
	if err := json.Unmarshal(index, &list); err != nil {
		return nil, fmt.Errorf("index.json: %w", err)
	}
	saved := savedImage(list.Manifests)
	var found []Referrer
	for _, e := range list.Manifests {
		if tag := cosignTagOf(e, saved); tag != "" {
			subject, suffix := parseCosignTag(tag)
			found = append(found, Referrer{bare(e), subject, suffix, tag})
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

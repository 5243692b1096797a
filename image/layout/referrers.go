package layout

import (
	"context"
	"encoding/json"
	"fmt"
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
	// Type is its artifact type, or what its name or its annotation says, such as sig.
	Type string
	// Name is the entry's, if that says what it is about.
	Name string
}

// Referrers lists what is about a manifest.
func (l *Layout) Referrers(ctx context.Context, d digest.Digest) ([]Referrer, error) {
	b, err := l.index(ctx)
	if err != nil || b == nil {
		return nil, err
	}
	return Referrers(ctx, b, l, d)
}

// Referrers lists the entries of an index.json that are about a manifest: those whose
// manifests have it as their subject, those with a name that cosign or a registry without
// a referrers API would give them, and those that "cosign save" put beside its image.
func Referrers(ctx context.Context, index []byte, blobs content.Provider, d digest.Digest) ([]Referrer, error) {
	var list ocispec.Index
	if err := json.Unmarshal(index, &list); err != nil {
		return nil, fmt.Errorf("index.json: %w", err)
	}
	about := strings.Replace(d.String(), ":", "-", 1)
	named := false
	for _, e := range list.Manifests {
		named = named || e.Digest == d
	}
	var found []Referrer
	for _, e := range list.Manifests {
		name, kind := e.Annotations[ocispec.AnnotationRefName], strings.TrimPrefix(e.Annotations[cosignKind], cosignKinds)
		switch suffix, ofName := strings.CutPrefix(name, about+"."); {
		case ofName:
			found = append(found, Referrer{bare(e), suffix, name})
		case named && kind != e.Annotations[cosignKind] && kind != "image" && kind != "imageIndex":
			found = append(found, Referrer{bare(e), kind, ""})
		case images.IsManifestType(e.MediaType) && e.Size <= maxReferrer:
			artifact, is, err := isAbout(ctx, blobs, e, d)
			if err != nil {
				return found, err
			}
			if is {
				found = append(found, Referrer{bare(e), artifact, ""})
			}
		}
	}
	return found, nil
}

// isAbout reports whether a manifest has d as its subject, and its artifact type.
func isAbout(ctx context.Context, blobs content.Provider, desc ocispec.Descriptor, d digest.Digest) (artifact string, is bool, err error) {
	doc, err := content.ReadBlob(ctx, blobs, bare(desc))
	if errdefs.IsNotFound(err) {
		return "", false, nil
	}
	if err != nil {
		return "", false, err
	}
	var m struct {
		ArtifactType string              `json:"artifactType"`
		Config       ocispec.Descriptor  `json:"config"`
		Subject      *ocispec.Descriptor `json:"subject"`
	}
	if json.Unmarshal(doc, &m) != nil || m.Subject == nil || m.Subject.Digest != d {
		return "", false, nil
	}
	if m.ArtifactType == "" {
		m.ArtifactType = m.Config.MediaType
	}
	return m.ArtifactType, true, nil
}

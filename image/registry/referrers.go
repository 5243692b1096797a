package registry

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Referrer is something in a registry that is about an image: a signature, an SBOM.
type Referrer struct {
	// Type is its artifact type, or what its tag says: sig, att or sbom.
	Type string
	// Name is its tag, or its digest.
	Name string
}

func (r Referrer) String() string { return fmt.Sprintf("%s (%s)", r.Name, r.Type) }

// cosignSuffixes end the tags under which cosign keeps what is about an image.
var cosignSuffixes = []string{"sig", "att", "sbom"}

// Referrers lists what is about an image: what the registry's referrers API lists, or its
// referrers tag, and what cosign keeps under tags.
func (r *Repository) Referrers(ctx context.Context, desc ocispec.Descriptor) ([]Referrer, error) {
	ctx, cancel := context.WithTimeout(ctx, requestWithin)
	defer cancel()
	var list []Referrer
	if f, ok := r.fetcher.(remotes.ReferrersFetcher); ok {
		found, err := f.FetchReferrers(ctx, desc.Digest)
		if err != nil && !errdefs.IsNotFound(err) {
			return nil, err
		}
		for _, d := range found {
			list = append(list, Referrer{d.ArtifactType, d.Digest.String()})
		}
	}
	for _, suffix := range cosignSuffixes {
		tag := cosignTag(desc.Digest, suffix)
		_, _, err := r.resolver.Resolve(ctx, r.spec.Locator+":"+tag)
		if err == nil {
			list = append(list, Referrer{suffix, tag})
		} else if !errdefs.IsNotFound(err) {
			return list, err
		}
	}
	return list, nil
}

func cosignTag(d digest.Digest, suffix string) string {
	return strings.Replace(d.String(), ":", "-", 1) + "." + suffix
}

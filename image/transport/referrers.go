package transport

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/ctrlplane/pilot/image/layout"
	"github.com/ctrlplane/pilot/image/registry"
)

// maxSubjects is of how many manifests the referrers are listed at once.
const maxSubjects = 8

// Referrer is something that is about a manifest of an image: a signature, an SBOM.
type Referrer struct {
	Subject digest.Digest `json:"subject"` // what it is about
	Name    string        `json:"name"`    // its tag, or its digest
	Type    string        `json:"type"`    // its artifact type, or what its tag says: sig, att, sbom
	// Kept says that the new image has that manifest and the referrer is where the new
	// image is. The others are about manifests that the new image does not have, or
	// can't be kept there.
	Kept bool `json:"kept"`
	// Error is why it could not be kept, if it was to be.
	Error string `json:"error,omitempty"`

	found registry.Referrer
}

// referring is a source that can list what is about a manifest.
type referring interface {
	Referrers(ctx context.Context, d digest.Digest) ([]registry.Referrer, error)
}

// indexed is a source that can list all that is about any manifest.
type indexed interface {
	Referrers(ctx context.Context) ([]layout.Referrer, error)
}

// keeper is a target that can keep what is about a manifest.
type keeper interface {
	Keep(ctx context.Context, from content.Provider, r Referrer) error
}

// Referrers lists what the source has about the manifests of the image before, and says
// what [Pair.Finish] is to keep of it with the image after. If restored is set, after may have
// had referrers already, as a decrypted image may. With an error it returns those that it
// found.
func (p *Pair) Referrers(ctx context.Context, before, after ocispec.Descriptor, restored bool) ([]Referrer, error) {
	referrers := p.listReferrers(ctx)
	if referrers == nil {
		return nil, nil
	}
	all, is := map[digest.Digest]bool{}, map[digest.Digest]bool{}
	if err := p.manifests(ctx, before, all, 0); err != nil {
		return nil, err
	}
	if err := p.manifests(ctx, after, is, 0); err != nil {
		return nil, err
	}
	if restored {
		maps.Copy(all, is)
	}
	seen := maps.Clone(all)
	_, keeps := p.target.(keeper)
	keeps = keeps || p.target.Holds(p.Source)

	var list []Referrer
	var err error
	// What is about a referrer, such as the signature of an SBOM, goes where that goes.
	for depth := 0; len(all) > 0 && depth < maxDepth && err == nil; depth++ {
		var found []Referrer
		found, err = referrersOf(ctx, all, referrers)
		all = map[digest.Digest]bool{}
		for _, r := range found {
			r.Kept = keeps && is[r.Subject]
			list = append(list, r)
			if d := r.found.Digest; !seen[d] {
				seen[d], all[d], is[d] = true, true, is[r.Subject]
			}
		}
	}
	slices.SortFunc(list, func(a, b Referrer) int {
		return strings.Compare(string(a.Subject)+a.Name, string(b.Subject)+b.Name)
	})
	return list, err
}

// referrersOf lists what is about each of these manifests.
func referrersOf(ctx context.Context, all map[digest.Digest]bool, referrers func(context.Context, digest.Digest) ([]registry.Referrer, error)) (list []Referrer, err error) {
	var mu sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(maxSubjects)
	for d := range all {
		g.Go(func() error {
			found, err := referrers(ctx, d)
			mu.Lock()
			defer mu.Unlock()
			for _, f := range found {
				name := f.Tag
				if name == "" {
					name = f.Digest.String()
				}
				list = append(list, Referrer{Subject: d, Name: name, Type: f.Type, found: f})
			}
			return err
		})
	}
	err = g.Wait()
	return list, err
}

// listReferrers returns how to list what the source has about a manifest, or nil.
func (p *Pair) listReferrers(ctx context.Context) func(context.Context, digest.Digest) ([]registry.Referrer, error) {
	if r, ok := p.Source.(referring); ok {
		return r.Referrers
	}
	var source indexed
	switch s := p.Source.(type) {
	case *layoutImage:
		source = s.Layout
	case *archived:
		source, _ = s.readable.(indexed)
	}
	if source == nil {
		return nil
	}
	all := sync.OnceValues(func() ([]layout.Referrer, error) { return source.Referrers(ctx) })
	return func(_ context.Context, d digest.Digest) ([]registry.Referrer, error) {
		list, err := all()
		var found []registry.Referrer
		for _, r := range list {
			if r.Subject == d {
				found = append(found, registry.Referrer{Descriptor: r.Descriptor, Type: r.Type, Tag: r.Name})
			}
		}
		return found, err
	}
}

// manifests adds the digests of a manifest or an index and of all that it lists. What is
// not there is not added.
func (p *Pair) manifests(ctx context.Context, desc ocispec.Descriptor, all map[digest.Digest]bool, depth int) error {
	if all[desc.Digest] || depth > maxDepth {
		return nil
	}
	doc, err := content.ReadBlob(ctx, p, desc)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	all[desc.Digest] = true
	var refers children
	if err := json.Unmarshal(doc, &refers); err != nil {
		return fmt.Errorf("%s: %w", desc.Digest, err)
	}
	for _, m := range refers.Manifests {
		if !registry.IsDocument(m.MediaType) {
			continue
		}
		if err := p.manifests(ctx, m, all, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// referrers brings those that are kept, unless they are there. One that can't be brought is
// not kept: nobody has to be able to put something beside an image that nobody can read.
func (f *finish) referrers(ctx context.Context, list []Referrer) error {
	to, ok := f.pair.target.(keeper)
	if f.same || !ok {
		return nil
	}
	for i, r := range list {
		if !r.Kept {
			continue
		}
		err := f.bring(ctx, r.found.Descriptor, 0)
		if err == nil {
			err = to.Keep(ctx, f.pair, r)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			list[i].Kept, list[i].Error = false, err.Error()
		}
	}
	return nil
}

// Keep pushes a referrer, whose blobs are there.
func (r registryImage) Keep(ctx context.Context, from content.Provider, ref Referrer) error {
	return r.PushReferrer(ctx, from, ref.found, ref.Subject)
}

// Keep adds a referrer, whose blobs are there, to those in the layout.
func (l *layoutImage) Keep(ctx context.Context, from content.Provider, ref Referrer) error {
	if err := l.Document(ctx, from, ref.found.Descriptor); err != nil {
		return err
	}
	return l.Tag(ctx, ref.found.Descriptor, ref.found.Tag, nil)
}

// Package imagekeys finds which KEKs a container of an image needs.
//
// containerd shares unpacked layers by their diff IDs, across images and namespaces. So what
// an image's manifest says of its layers is no proof of whose files its containers have. What
// a container needs is found by the diff IDs of its image, in the record of what was
// decrypted on this node: package layerkeys.
package imagekeys

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync/atomic"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/singleflight"

	"github.com/ctrlplane/pilot/internal/layerkeys"
	"github.com/ctrlplane/pilot/internal/localstore"
	"github.com/ctrlplane/pilot/internal/mustencrypt"
	"github.com/ctrlplane/pilot/processor"
)

// Image is an image of a containerd's.
type Image struct {
	// Name is the image's as the container runtime has it, such as
	// docker.io/library/app:1, or "" if Digest is set.
	Name string
	// Digest is that of its manifest or index, or "": the one that Name stands for now.
	Digest digest.Digest
}

// KEK is a version of a KEK. Version is 0 where the broker has no versions.
type KEK = layerkeys.KEK

// Layer is one way in which a container has to be allowed to use a layer. A diff ID can have
// several, all of which count.
type Layer struct {
	DiffID digest.Digest
	// KEKs open the layer: any one of them is enough.
	KEKs []KEK
	// Other reports that a key opens it that is not a KEK of the broker's, and would be
	// enough too.
	Other bool
	// Unproven reports that the image has the layer plain, and containerd has not fetched it,
	// so that nothing shows whether it has the same content.
	Unproven bool
	// Why says why the layer needs a key although the image does not say so, and what to do
	// about that. It is "" where the image itself is encrypted for these KEKs.
	Why string
}

// Config says how a [Resolver] works.
type Config struct {
	Client *containerd.Client
	Record *layerkeys.Record
	// Keys and DecryptionKeysPath are what layer keys are unwrapped with, as those of the
	// differ.
	Keys               processor.Keys
	DecryptionKeysPath string
	// Rules returns those of the setting must-be-encrypted. May be nil: none.
	Rules func() mustencrypt.Rules
}

// Resolver finds which KEKs containers need. It is safe for concurrent use.
type Resolver struct {
	conf   Config
	store  content.Store
	keys   *processor.KeyDir
	docs   documents
	proofs proofs
	begins singleflight.Group
	begun  atomic.Bool

	snapshotterNames atomic.Pointer[[]string]
}

// New returns a Resolver.
func New(conf Config) *Resolver {
	if conf.Rules == nil {
		conf.Rules = func() mustencrypt.Rules { return nil }
	}
	store := localstore.New(conf.Client)
	return &Resolver{conf: conf, store: store, keys: processor.NewKeyDir(conf.DecryptionKeysPath, nil), docs: documents{store: conf.Client.ContentStore()}, proofs: newProofs()}
}

// Needs returns what a container of an image in containerd's namespace ns has to be allowed
// to use: all of the layers that it returns, and none for plain images. The error is one of
// errdefs: ErrNotFound if there is no such image. A caller that gets an error must not start
// the container.
//
// It takes calls of containerd's API: one for each snapshotter, and one more where Digest is not
// set. Where layers have to be read to find out what they are, it waits a second, and
// what it returns says that another call may find less to be needed.
func (r *Resolver) Needs(ctx context.Context, ns string, image Image) ([]Layer, error) {
	ctx = namespaces.WithNamespace(ctx, ns)
	if err := r.Begin(ctx); err != nil {
		return nil, err
	}
	_, docs, err := r.read(ctx, image)
	if err != nil {
		return nil, err
	}
	waiting, cancel := context.WithTimeout(ctx, proofWait)
	defer cancel()
	var all []Layer
	for _, doc := range docs {
		if err := r.checkBases(ctx, doc); err != nil {
			return nil, err
		}
		for _, p := range doc.parts {
			all = append(all, r.needs(waiting, p)...)
		}
	}
	return all, ctx.Err()
}

// read returns the manifests of an image that containerd may run.
func (r *Resolver) read(ctx context.Context, image Image) (digest.Digest, []*document, error) {
	target := ocispec.Descriptor{Digest: image.Digest}
	if target.Digest == "" {
		found, err := r.conf.Client.ImageService().Get(ctx, image.Name)
		if err != nil {
			return "", nil, fmt.Errorf("image %.200q: %w", image.Name, err)
		}
		target = found.Target
	}
	docs, err := r.docs.manifests(ctx, target)
	if err != nil {
		return "", nil, fmt.Errorf("image %.200q: %w", cmp.Or(image.Name, target.Digest.String()), err)
	}
	return target.Digest, docs, nil
}

// needs returns what the containers of an image need for one of its diff IDs.
func (r *Resolver) needs(ctx context.Context, p part) []Layer {
	known, ok := r.conf.Record.Layer(p.diffID)
	if !ok {
		// No encrypted layer of that content was ever unpacked here, so what is there is
		// plain, and the image has only its own word to keep.
		var all []Layer
		for _, l := range p.layers {
			if l.encrypted() {
				all = append(all, claimed(p.diffID, l.claimed))
			}
		}
		return unique(all)
	}
	isPlain, unproven, why := r.prove(ctx, p, known)
	if isPlain {
		return nil
	}
	if known, ok = r.conf.Record.Layer(p.diffID); !ok {
		return nil // what was claimed was found to be false
	}
	if l, ok := decrypted(p.diffID, known); ok {
		l.Why, l.Unproven = why, unproven
		return []Layer{l}
	}
	var all []Layer
	for _, b := range known.Blobs {
		all = append(all, Layer{DiffID: p.diffID, KEKs: b.KEKs, Other: b.Other, Why: why, Unproven: unproven})
	}
	return unique(all)
}

// decrypted returns what is needed for a layer that was decrypted here.
func decrypted(diffID digest.Digest, known layerkeys.Layer) (l Layer, ok bool) {
	l.DiffID = diffID
	for _, b := range known.Blobs {
		if b.Basis != layerkeys.Decrypted {
			continue
		}
		if ok = true; len(l.KEKs) == 0 {
			l.KEKs, l.Other = slices.Clip(b.KEKs), l.Other || b.Other
			continue
		}
		for _, k := range b.KEKs {
			if !slices.Contains(l.KEKs, k) {
				l.KEKs = append(l.KEKs, k)
			}
		}
		l.Other = l.Other || b.Other
	}
	return l, ok
}

func claimed(diffID digest.Digest, openers []processor.Opener) Layer {
	l := Layer{DiffID: diffID}
	for _, o := range openers {
		if o.KEK == "" {
			l.Other = true
		} else if k := (KEK{ID: o.KEK, Version: o.Version}); !slices.Contains(l.KEKs, k) {
			l.KEKs = append(l.KEKs, k)
		}
	}
	return l
}

// unique returns the layers that differ.
func unique(all []Layer) []Layer {
	for i := 0; i < len(all); i++ {
		all = slices.Concat(all[:i+1], slices.DeleteFunc(slices.Clone(all[i+1:]), func(o Layer) bool {
			return o.Other == all[i].Other && slices.Equal(o.KEKs, all[i].KEKs)
		}))
	}
	return all
}

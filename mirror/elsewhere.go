package mirror

import (
	"context"
	"crypto/cipher"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/internal/claims"
	"github.com/ctrlplane/pilot/processor"
)

const (
	// placeTTL is how long a layer is read from another place before its own is asked again.
	placeTTL = 5 * time.Minute
	// noPlaceTTL is how long no other place is looked for after none had the layer.
	noPlaceTTL = 10 * time.Second
	// maxPlaces bounds the places that are asked for one range.
	maxPlaces = 8
)

// place is where a layer can be read.
type place struct {
	target
	desc ocispec.Descriptor // of the blob
	as   *lazyLayer         // it with its key, or nil: not opened
}

// sought says where a layer is read that its own repository has not given.
type sought struct {
	of    string // its repository's key
	found *place // nil: nowhere
	at    time.Time
}

// readLazy returns a plain range of a layer, from its repository or, if that does not give it,
// from where another image of containerd's has it.
//
// A node asks for a layer under the name of the image for which it was mounted first. That may
// be gone in the registry, or be for other nodes, while images of other names that share the
// layer are in use. They may have the same blob in another repository, or the layer in a blob of
// their own. What is read is verified wherever it is from.
func (m *Mirror) readLazy(ctx context.Context, repo *repository, layer *lazyLayer, offset, length int64) (io.ReadCloser, error) {
	own := place{repo.target, layer.desc, layer}
	first, last := own, layer.soughtFor(repo)
	if last != nil && last.found != nil {
		first = *last.found
	}
	body, err := m.readAt(ctx, repo, layer, &first, offset, length)
	if err == nil || ctx.Err() != nil || last != nil && last.found == nil && time.Since(last.at) < noPlaceTTL {
		return body, err
	}
	if other := layer.sought.Load(); last == nil && other != nil && other.found != nil && time.Since(other.at) < placeTTL {
		// The layer is mounted under another name, too.
		p := *other.found
		if body, otherErr := m.readAt(ctx, repo, layer, &p, offset, length); otherErr == nil {
			return body, nil
		}
	}
	now := &sought{of: own.key(), at: time.Now()}
	found, _, _ := m.lazy.searches.Do(own.key()+"@"+own.object, func() (any, error) {
		return m.placesOf(context.WithoutCancel(ctx), own.target, layer), nil
	})
	for _, p := range found.([]place) {
		if p.desc.Digest == layer.desc.Digest {
			p.as = layer
		}
		if p.key() == first.key() && p.desc.Digest == first.desc.Digest {
			continue
		}
		body, otherErr := m.readAt(ctx, repo, layer, &p, offset, length)
		if otherErr != nil {
			continue
		}
		now.found = &p
		if !isGone(err) {
			now.at = now.at.Add(noPlaceTTL - placeTTL) // it may be back at once
		}
		if (p.key() != own.key() || p.as != layer) && m.lazy.first(failureKey{layer: layer.desc.Digest, reason: "elsewhere " + own.key()}) {
			logrus.WithError(shown(err)).WithFields(ofLayer(layer.desc)).WithFields(logrus.Fields{"image": own.key(), "from": p.key() + "@" + p.desc.Digest.String()}).
				Warn("lazily pulled layer read where another image has it: its own repository does not give it")
		}
		layer.setSought(now)
		return body, nil
	}
	if ctx.Err() == nil {
		layer.setSought(now)
	}
	return nil, err
}

// readAt returns a plain range of a layer of repo at a place, which it opens.
func (m *Mirror) readAt(ctx context.Context, repo *repository, layer *lazyLayer, p *place, offset, length int64) (_ io.ReadCloser, err error) {
	if err := m.checkAllowed(p.registry); err != nil {
		return nil, err
	}
	if p.as == nil {
		as := newLazyLayer(p.desc)
		as.sealed = layer.sealed // what else its key has sealed is an error
		if err := m.unwrapLazy(ctx, as); err != nil {
			return nil, err
		}
		p.as = as
		defer func() {
			if err != nil {
				as.clear()
			}
		}()
	} else if p.as != layer {
		if err := m.refresh(ctx, p.as); err != nil {
			return nil, err
		}
		defer func() {
			if layer.sought.Load().twin(layer) != p.as {
				p.as.clear() // it is read elsewhere by now, and nobody else would
			}
		}()
	}
	if p.key() != repo.key() {
		other, err := m.open(ctx, caller{trusted: true}, p.target)
		if err != nil {
			return nil, err
		}
		repo = other
	}
	body, err := repo.fetchRange(ctx, p.desc, offset, length)
	if err != nil {
		return nil, err
	}
	stream, err := p.as.keyStream(offset)
	if err != nil {
		body.Close()
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{cipher.StreamReader{S: stream, R: body}, body}, nil
}

// placesOf returns where a layer may be: at its own place, where other images have the same blob,
// and where they have other blobs as the same layer. None is opened.
func (m *Mirror) placesOf(ctx context.Context, own target, layer *lazyLayer) []place {
	list := []place{{target: own, desc: layer.desc}}
	within, cancel := context.WithTimeout(ctx, claimsTimeout)
	defer cancel()
	all, err := m.lazy.images.All(within)
	if err != nil {
		return list
	}
	var same, twins []claims.Claim
	for _, c := range all {
		switch {
		case slices.Contains(c.Blobs, layer.desc.Digest):
			same = append(same, c)
		case c.DiffID == layer.sealed.DiffID && c.Layer.Size == layer.sealed.Size && processor.IsEncrypted(c.Layer.MediaType):
			twins = append(twins, c)
		}
	}
	type claim struct {
		namespace       string
		manifest, layer digest.Digest
	}
	seen, names := map[claim]bool{}, map[string]map[digest.Digest][]string{}
	for i, c := range append(same, twins...) {
		key := claim{c.Namespace, c.Manifest, c.Layer.Digest}
		if seen[key] || len(list) == maxPlaces {
			continue
		}
		seen[key] = true
		if names[c.Namespace] == nil {
			if names[c.Namespace], err = m.lazy.images.Names(within, c.Namespace); err != nil {
				return list
			}
		}
		for _, name := range slices.Sorted(slices.Values(names[c.Namespace][c.Manifest])) {
			p := place{target: own, desc: layer.desc}
			if i >= len(same) {
				p.desc, p.object = c.Layer, c.Layer.Digest.String()
			}
			spec, err := reference.Parse(name)
			if err != nil || digest.Digest(name).Validate() == nil {
				continue // CRI's name of an image by its ID
			}
			p.registry = spec.Hostname()
			p.repository = strings.TrimPrefix(spec.Locator, p.registry+"/")
			isNew := !slices.ContainsFunc(list, func(l place) bool { return l.key() == p.key() && l.desc.Digest == p.desc.Digest })
			if isNew && len(list) < maxPlaces && CheckRegistry(p.registry) == nil && aRepository.MatchString(p.repository) && m.allows(p.registry) {
				list = append(list, p)
			}
		}
	}
	return list
}

// isGone reports whether a registry's answer says that it does not give something, and not that
// it can't now.
func isGone(err error) bool {
	if _, ok := errors.AsType[*notLazy](err); ok {
		return true
	}
	status, ok := errors.AsType[remoteerrors.ErrUnexpectedStatus](err)
	return ok && status.StatusCode < http.StatusInternalServerError && status.StatusCode != http.StatusTooManyRequests && status.StatusCode != http.StatusRequestTimeout
}

// wholeAt returns the repository from which all of a layer's own blob is read.
func (m *Mirror) wholeAt(ctx context.Context, repo *repository, layer *lazyLayer) (*repository, error) {
	if last := layer.soughtFor(repo); last != nil && last.found != nil && last.found.as == layer {
		if other, err := m.open(ctx, caller{trusted: true}, last.found.target); err == nil {
			return other, nil
		}
	}
	return repo, m.checkAllowed(repo.registry)
}

// checkAllowed returns an error if layers are not read from a registry.
func (m *Mirror) checkAllowed(registry string) error {
	if m.allows(registry) {
		return nil
	}
	return &notLazy{reasonRegistry, fmt.Errorf("%s is not one of mirror-allowed-upstreams", registry)}
}

// soughtFor returns where the layer is read that a repository has not given lately, or nil.
func (l *lazyLayer) soughtFor(repo *repository) *sought {
	last := l.sought.Load()
	if last == nil || last.of != repo.key() || time.Since(last.at) > placeTTL {
		return nil
	}
	return last
}

// setSought notes where the layer is read.
func (l *lazyLayer) setSought(s *sought) {
	if was := l.sought.Swap(s).twin(l); was != nil && was != s.twin(l) {
		was.clear()
	}
}

// twin returns another blob's layer that is read in the place of l, or nil.
func (s *sought) twin(l *lazyLayer) *lazyLayer {
	if s == nil || s.found == nil || s.found.as == l {
		return nil
	}
	return s.found.as
}

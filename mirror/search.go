package mirror

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/image/registry"
)

const (
	// maxTags bounds the tags that are listed, and maxSearched those that are searched for
	// a plain digest.
	maxTags     = 1000
	maxSearched = 200
	// searchTimeout bounds such a search.
	searchTimeout = time.Minute
	// missTTL is how long it is not made again for a digest that was not found.
	missTTL = 30 * time.Second
	// maxMisses bounds the digests that were not found and are remembered.
	maxMisses = 1024
)

// searches are the searches for plain digests that no image is remembered for, such as
// after a restart. Those in one registry run one after the other.
type searches struct {
	mu     sync.Mutex
	misses map[imageKey]time.Time
}

// missed reports whether a digest was not found a short time ago.
func (s *searches) missed(key imageKey) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Since(s.misses[key]) < missTTL
}

func (s *searches) miss(key imageKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.misses == nil || len(s.misses) >= maxMisses {
		s.misses = map[imageKey]time.Time{}
	}
	s.misses[key] = time.Now()
}

// search looks for the image that has a document or a layer of that plain digest among the
// repository's tags, the last of the registry's list first. If there is one, it is
// remembered then.
func (m *Mirror) search(ctx context.Context, repo *repository, d digest.Digest) error {
	key := imageKey{repo.key(), d}
	leave, err := enter(ctx, repo.upstream.searching)
	if err != nil {
		return err
	}
	defer leave()
	if m.images.find(key.repository, d) != nil || m.searches.missed(key) {
		return nil // another request has searched meanwhile
	}
	within, cancel := context.WithTimeout(ctx, searchTimeout)
	defer cancel()
	var tags []string
	err = m.documents.do(within, repo.registry, func(ctx context.Context) (err error) {
		tags, err = repo.Tags(ctx, maxTags)
		return err
	})
	if refuses(err) {
		// It has no such repository or no list, or not for this caller.
		m.searches.miss(key)
		return nil
	}
	if err != nil {
		return err
	}
	searched := 0
	for n := len(tags) - 1; n >= 0 && searched < maxSearched && within.Err() == nil; n-- {
		if !aTag.MatchString(tags[n]) || strings.HasPrefix(tags[n], "sha256-") {
			continue // cosign's and referrers' tags are about images
		}
		searched++
		if i := m.taggedImage(within, repo, tags[n]); i != nil && i.has(d) {
			m.images.prefer(i)
			return nil
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	m.searches.miss(key)
	logrus.WithFields(logrus.Fields{"repository": key.repository, "digest": d, "tags": searched, "of": len(tags)}).Info("no tag of the repository has this digest, encrypted or not")
	return nil
}

// refuses reports whether an error is a registry's refusal, which is no answer about
// anything but what was asked.
func refuses(err error) bool {
	var status remoteerrors.ErrUnexpectedStatus
	if errors.As(err, &status) {
		return status.StatusCode/100 == 4 && status.StatusCode != http.StatusTooManyRequests && status.StatusCode != http.StatusRequestTimeout
	}
	return errdefs.IsNotFound(err) || errors.Is(err, docker.ErrInvalidAuthorization)
}

// taggedImage returns the image of a tag, or nil if it can't be decrypted here.
func (m *Mirror) taggedImage(ctx context.Context, repo *repository, tag string) *plainImage {
	t := repo.target
	t.kind, t.object = "manifests", tag
	tagged, err := repo.upstream.open(ctx, t)
	if err != nil {
		return nil
	}
	desc, err := tagged.Resolve(ctx)
	if err != nil || !registry.IsDocument(desc.MediaType) {
		return nil
	}
	i, err := m.plain(ctx, tagged, desc)
	if err != nil {
		logrus.WithError(shown(err)).WithField("image", t.reference()).Debug("image not searched")
		return nil
	}
	return i
}

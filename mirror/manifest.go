package mirror

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/image/registry"
)

// manifest answers with a manifest or an index: a plain one for a tag, and for the digest
// of a plain one; what the registry has for other digests.
func (m *Mirror) manifest(w *answer, r *http.Request, repo *repository) error {
	ctx := r.Context()
	d := repo.digest()
	if d != "" {
		doc, err := m.plainDocument(ctx, repo, d)
		if err != nil || doc != nil {
			return send(w, r, doc, d, err)
		}
	}
	desc, err := repo.Resolve(ctx)
	switch {
	case errdefs.IsNotFound(err) && d != "":
		if searchErr := m.search(ctx, repo, d); searchErr != nil {
			return searchErr
		}
		// It may be another caller who has found it.
		doc, plainErr := m.plainDocument(ctx, repo, d)
		if plainErr == nil && doc == nil {
			return err
		}
		return send(w, r, doc, d, plainErr)
	case err != nil:
		return err
	case !registry.IsDocument(desc.MediaType):
		return &requestError{http.StatusNotFound, "MANIFEST_UNKNOWN", fmt.Sprintf("%s is %s, and not a manifest or an index", desc.Digest, desc.MediaType)}
	case d == "":
		i, err := m.plain(ctx, repo, desc)
		if err != nil {
			return err
		}
		if !i.isPlain() {
			doc, err := m.documentOf(ctx, i, i.Target.Digest)
			return send(w, r, doc, i.Target.Digest, err)
		}
	}
	if r.Method == http.MethodHead {
		w.head(desc.MediaType, desc.Digest, desc.Size)
		w.WriteHeader(http.StatusOK)
		return nil
	}
	leave, err := m.documents.enter(ctx, w.work())
	if err != nil {
		return err
	}
	defer leave()
	b, err := content.ReadBlob(ctx, repo, desc)
	return send(w, r, &image.Document{MediaType: desc.MediaType, Content: b}, desc.Digest, err)
}

// send answers with a document, unless err is set.
func send(w *answer, r *http.Request, doc *image.Document, d digest.Digest, err error) error {
	if err != nil {
		return err
	}
	w.head(doc.MediaType, d, int64(len(doc.Content)))
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return nil
	}
	_, err = w.Write(doc.Content)
	return err
}

// makeTimeout bounds the making of a plain image: of its layers some may have to be read.
const makeTimeout = 15 * time.Minute

// plain returns the image that desc describes, as it is once it is decrypted. The caller
// has asked the registry for desc. Callers that go away do not end what others with the same
// credentials may wait for, and what they themselves find done when they try again.
func (m *Mirror) plain(ctx context.Context, repo *repository, desc ocispec.Descriptor) (*plainImage, error) {
	if i := m.images.find(repo.key(), desc.Digest); i != nil {
		return i, nil
	}
	made := m.makes.DoChan(fmt.Sprintf("%x %s@%s", repo.upstream.credentials, repo.key(), desc.Digest), func() (any, error) {
		return m.makePlain(context.WithoutCancel(ctx), repo, desc)
	})
	select {
	case r := <-made:
		if r.Err != nil {
			return nil, r.Err
		}
		return r.Val.(*plainImage), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (m *Mirror) makePlain(ctx context.Context, repo *repository, desc ocispec.Descriptor) (*plainImage, error) {
	ctx, cancel := context.WithTimeout(ctx, makeTimeout)
	defer cancel()
	var p image.Plaintext
	err := m.making.do(ctx, repo.registry, func(ctx context.Context) (err error) {
		p, err = image.PlaintextOf(ctx, repo, desc, m.unwrap)
		return err
	})
	if err != nil {
		return nil, err
	}
	i := newPlainImage(repo.key(), desc, p)
	m.images.add(i)
	return i, nil
}

// plainDocument returns the plain document of that digest, if it is that of an image that
// is remembered and that the registry has and lets the caller read, or nil.
func (m *Mirror) plainDocument(ctx context.Context, repo *repository, d digest.Digest) (*image.Document, error) {
	i := m.images.find(repo.key(), d)
	if i == nil {
		return nil, nil
	}
	if _, ok := i.Documents[d]; !ok {
		return nil, nil
	}
	t := repo.target
	t.object = i.encrypted.Digest.String()
	encrypted, err := repo.upstream.open(ctx, t)
	if err != nil {
		return nil, err
	}
	_, err = encrypted.Resolve(ctx)
	if errdefs.IsNotFound(err) {
		m.images.forget(i)
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return m.documentOf(ctx, i, d)
}

// documentOf returns a plain document of an image, if its keys can be unwrapped now. The
// caller has asked the registry for the image.
func (m *Mirror) documentOf(ctx context.Context, i *plainImage, d digest.Digest) (*image.Document, error) {
	if !i.keysTried() {
		if err := m.checkKeys(ctx, i.Layers); err != nil {
			return nil, err
		}
		i.tried.Store(time.Now().UnixNano())
	}
	m.images.prefer(i) // the caller asks for its layers next
	doc := i.Documents[d]
	return &doc, nil
}

package mirror

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/singleflight"

	"github.com/ctrlplane/pilot/internal/claims"
	"github.com/ctrlplane/pilot/internal/layerkeys"
	"github.com/ctrlplane/pilot/internal/traceid"
	"github.com/ctrlplane/pilot/processor"
)

// lazyPath begins the paths of layers for pilot's snapshotter. It requests ranges of the
// encrypted layer, by its digest, and gets those of the plain one. Only [Mirror.LazyServer]
// has them: who resumes the download of a blob must not get other bytes than it began with.
const lazyPath = "/lazy"

// lazy serves parts of encrypted layers to the snapshotter of this machine's containerd.
//
// A part is not covered by the layer's HMAC. What makes it authentic is the chain from the
// layer's key to the seal ([image.SealedLazy]), to the layer's last bytes, which are verified
// and served from memory, to the table of contents in them, by which the snapshotter checks
// each chunk.
type lazy struct {
	images   *claims.Finder
	metrics  *lazyMetrics
	streams  *streams
	opening  chan struct{} // has one for each layer that is being opened
	opens    singleflight.Group
	proving  chan struct{} // has one for each layer that is being read as a whole
	proofs   singleflight.Group
	searches singleflight.Group // for other places of a layer
	slow     atomic.Int64       // until when containerd counts as slow, in Unix nanoseconds

	mu     sync.Mutex
	layers map[digest.Digest]*lazyLayer
	tails  int                      // bytes of the layers' tails
	noted  map[failureKey]time.Time // failures that were logged
}

const (
	// maxLazyStreams is how many ranges are sent at once. Each takes a buffer of
	// rangeBuffer bytes.
	maxLazyStreams = 64
	rangeBuffer    = 64 << 10
	// maxLazyOpening is how many layers are opened at once.
	maxLazyOpening = 4
	// maxLazyProving is how many layers are read as a whole at once.
	maxLazyProving = 2
	// maxLazyLayers bounds the layers that are remembered.
	maxLazyLayers = 1024
	// maxCandidates bounds the different keys of one layer that are tried.
	maxCandidates = 16
	// openTimeout bounds the opening of a layer. stargz-snapshotter waits for 30 seconds.
	openTimeout = 25 * time.Second
	// claimsTimeout bounds the listing of containerd's images, and slowClaimsTimeout those
	// in slowFor after one that took longer: an image has many layers, and containerd asks
	// for one after the other.
	claimsTimeout     = 5 * time.Second
	slowClaimsTimeout = time.Second
	slowFor           = 30 * time.Second
	// noteTTL is how long a layer's failure is not logged and counted again.
	noteTTL  = 10 * time.Minute
	maxNoted = 1024
)

// tocAnnotation, on a layer, has the digest of its table of contents.
const tocAnnotation = "containerd.io/snapshot/stargz/toc.digest"

// annotationForLazy reports whether an annotation of a layer is needed to serve parts of it.
func annotationForLazy(key string) bool {
	return strings.HasPrefix(key, processor.AnnotationPrefix) || key == tocAnnotation
}

func newLazy(conf Config) *lazy {
	if conf.Images == nil {
		return nil
	}
	conf.Images.Keep = annotationForLazy
	return &lazy{
		images: conf.Images, metrics: newLazyMetrics(conf.Metrics), streams: newStreams(maxLazyStreams),
		opening: make(chan struct{}, maxLazyOpening), proving: make(chan struct{}, maxLazyProving), layers: map[digest.Digest]*lazyLayer{}, noted: map[failureKey]time.Time{},
	}
}

// serveLazy answers a request below lazyPath, of which path is the rest.
func (m *Mirror) serveLazy(w *answer, r *http.Request, c caller, path string) {
	below := r.Clone(r.Context())
	below.URL.Path = path
	t, err := m.parse(below)
	switch {
	case err != nil:
	case t.kind != "blobs":
		err = &requestError{http.StatusNotFound, "UNSUPPORTED", "layers alone are served in ranges"}
	case m.lazy == nil:
		err = &requestError{http.StatusNotFound, "UNSUPPORTED", "this mirror has no containerd, whose images it would need to know: that is what pilot serve is for"}
	default:
		trace.SpanFromContext(r.Context()).SetAttributes(
			attribute.String("pilot.layer.digest", t.object), attribute.String("pilot.layer.range", r.Header.Get("Range")))
		w.registry = t.registry
		if err = m.lazyBlob(w, r, c, t); err != nil && w.ended.Load() {
			err = errSlow // which the error may not say
		}
	}
	if err != nil {
		m.failLazy(w, r, c, t, err)
	}
}

// lazyBlob answers with a range of a layer, or, to HEAD, with its size.
func (m *Mirror) lazyBlob(w *answer, r *http.Request, c caller, t target) (err error) {
	var asked byteRange
	if r.Method == http.MethodGet {
		if asked, err = parseRange(r.Header); err != nil {
			return err
		}
	}
	mounts := r.Method == http.MethodHead || asked == mountRange
	repo, err := m.open(r.Context(), c, t)
	if err != nil {
		return err
	}
	began := time.Now()
	defer func() {
		if mounts && err != nil {
			err = &mountError{err}
		}
		m.lazy.metrics.ended(m.judgeLazy(err), began)
	}()
	layer, err := m.lazyLayer(r.Context(), repo, mounts, r.URL.Query().Get("snapshot"))
	if err != nil {
		return err
	}
	if toc := r.URL.Query().Get("toc"); toc != "" && toc != layer.sealed.TOC.String() {
		// The image that it was mounted for is gone, and another has the same blob.
		return &notLazy{reasonClaim, fmt.Errorf("its snapshot has the table of contents %s, of an image that was removed, and its key has sealed %s: "+
			"remove the containers and images that use the snapshot, and pull again", toc, layer.sealed.TOC)}
	}
	size := layer.sealed.Size
	w.Header().Set("Accept-Ranges", "bytes")
	if r.Method == http.MethodHead {
		w.head(octets, "", size)
		w.WriteHeader(http.StatusOK)
		return nil
	}
	offset, length, err := asked.within(size)
	if err != nil {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", size))
		return &requestError{http.StatusRequestedRangeNotSatisfiable, "UNSUPPORTED", fmt.Sprintf("layer %s has %d bytes: %s", t.object, size, err)}
	}
	return m.sendRange(w, r, repo, layer, offset, length)
}

// sendRange answers with a range of a layer.
func (m *Mirror) sendRange(w *answer, r *http.Request, repo *repository, layer *lazyLayer, offset, length int64) error {
	leave, err := m.lazy.streams.enter(r.Context(), w)
	if err != nil {
		return err
	}
	defer leave()
	begin := func() {
		w.head(octets, "", length)
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", offset, offset+length-1, layer.sealed.Size))
		w.WriteHeader(http.StatusPartialContent)
	}
	end := offset + length
	if end <= int64(len(layer.head)) {
		begin()
		return m.sendMemory(w, layer.head[offset:end])
	}
	var tail []byte // of the range
	if from := layer.sealed.TailOffset; end > from {
		all, err := m.tail(r.Context(), repo, layer)
		if err != nil {
			return err
		}
		tail = all[max(0, offset-from) : end-from]
		end = from
	}
	if offset < end {
		body, err := m.readLazy(r.Context(), repo, layer, offset, end-offset)
		if err != nil {
			return err
		}
		defer body.Close()
		begin()
		buffer := rangeBuffers.Get().(*[rangeBuffer]byte)
		defer rangeBuffers.Put(buffer)
		n, err := io.CopyBuffer(writerOnly{w}, body, buffer[:])
		m.lazy.metrics.bytes.WithLabelValues("registry").Add(float64(n))
		if err != nil {
			return err
		}
	} else {
		begin()
	}
	return m.sendMemory(w, tail)
}

var rangeBuffers = sync.Pool{New: func() any { return new([rangeBuffer]byte) }}

func (m *Mirror) sendMemory(w *answer, b []byte) error {
	n, err := w.Write(b)
	m.lazy.metrics.bytes.WithLabelValues("memory").Add(float64(n))
	return err
}

// lazyLayer returns the layer that a request is about, with a key that may be used now. If
// the snapshotter is about to mount it, or it is not known, each image of containerd's that
// has it must have it unpacked under the diff ID that is sealed: a snapshot is known by the
// diff IDs of a configuration, which anybody can write. If snapshot is not "", one of them must
// have it there: what an image that was removed has sealed under that name counts no more.
func (m *Mirror) lazyLayer(ctx context.Context, repo *repository, mounts bool, snapshot string) (*lazyLayer, error) {
	d := repo.digest()
	layer := m.lazy.find(d)
	if layer == nil || mounts {
		all, found, err := m.claims(ctx, d)
		if err != nil {
			return nil, err
		}
		isKnown := layer != nil && slices.ContainsFunc(found, func(c claims.Claim) bool { return layer.isOf(c.Layer) })
		if isKnown && len(candidates(found, d)) > 1 {
			// Another image may have its key wrapped for a KEK that this machine may still use.
			isKnown = m.refresh(ctx, layer) == nil
		}
		if !isKnown {
			if layer, err = m.openLayer(ctx, repo, found); err != nil {
				return nil, err
			}
		}
		for _, c := range found {
			if c.Unread {
				return nil, &notLazy{reasonClaim, fmt.Errorf("manifest %s in namespace %s has it, and its configuration is too large to be read: remove that image", c.Manifest, c.Namespace)}
			}
			if c.DiffID != layer.sealed.DiffID {
				return nil, &notLazy{reasonClaim, fmt.Errorf("manifest %s in namespace %s has it unpacked as %s, and its key has sealed that it is %s: "+
					"the image is damaged, or made to have this layer taken for another", c.Manifest, c.Namespace, c.DiffID, layer.sealed.DiffID)}
			}
		}
		if snapshot != "" && !slices.ContainsFunc(found, func(c claims.Claim) bool { return c.ChainID.String() == snapshot }) {
			return nil, &notLazy{reasonClaim, fmt.Errorf("its snapshot is called %s, by an image that was removed, and no other has it there: "+
				"remove the containers and images that use the snapshot, and pull again", snapshot)}
		}
		if err := m.refresh(ctx, layer); err != nil {
			return nil, err
		}
		if err := m.checkShared(ctx, repo, layer, all); err != nil {
			return nil, err
		}
		if p := layer.proof.Load(); p != nil && p.err != nil {
			return nil, p.err // what is false is not recorded again
		}
		if err := m.record(layer, layerkeys.Sealed, ""); err != nil {
			return nil, err
		}
	}
	if p := layer.proof.Load(); p != nil && p.err != nil {
		return nil, p.err
	}
	return layer, m.refresh(ctx, layer)
}

// claims returns what the images of containerd claim, and what of that is about a blob, at
// least one claim.
func (m *Mirror) claims(ctx context.Context, d digest.Digest) (all, found []claims.Claim, err error) {
	timeout := claimsTimeout
	if time.Now().UnixNano() < m.lazy.slow.Load() {
		timeout = slowClaimsTimeout
	}
	within, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if all, err = m.lazy.images.All(within); err != nil {
		if ctx.Err() == nil && within.Err() != nil {
			m.lazy.slow.Store(time.Now().Add(slowFor).UnixNano())
			err = fmt.Errorf("not listed in %v: %w", timeout, err)
		}
		return nil, nil, &imagesError{err}
	}
	for _, c := range all {
		if slices.Contains(c.Blobs, d) {
			found = append(found, c)
		}
	}
	if len(found) == 0 {
		return nil, nil, &notLazy{reasonUnknown, errors.New("no manifest in containerd's content store has the layer")}
	}
	return all, found, nil
}

// openLayer opens the layer that images claim. Callers that go away do not end what others
// may wait for.
func (m *Mirror) openLayer(ctx context.Context, repo *repository, found []claims.Claim) (*lazyLayer, error) {
	d := repo.digest()
	opened := m.lazy.opens.DoChan(repo.key()+"@"+d.String(), func() (any, error) {
		within, cancel := context.WithTimeout(context.WithoutCancel(ctx), openTimeout)
		defer cancel()
		leave, err := enter(within, m.lazy.opening)
		if err != nil {
			return nil, err
		}
		defer leave()
		return m.openAny(within, repo, candidates(found, d))
	})
	select {
	case r := <-opened:
		if r.Err != nil {
			return nil, r.Err
		}
		return r.Val.(*lazyLayer), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// candidates returns the different descriptors with which images have an encrypted layer.
func candidates(found []claims.Claim, d digest.Digest) (list []ocispec.Descriptor) {
	for _, c := range found {
		if c.Layer.Digest == d && processor.IsEncrypted(c.Layer.MediaType) && len(list) < maxCandidates &&
			!slices.ContainsFunc(list, func(l ocispec.Descriptor) bool { return sameLayer(l, c.Layer) }) {
			list = append(list, c.Layer)
		}
	}
	return list
}

// openAny opens a layer by the first of its descriptors whose key can be unwrapped and has
// sealed it.
func (m *Mirror) openAny(ctx context.Context, repo *repository, list []ocispec.Descriptor) (*lazyLayer, error) {
	if len(list) == 0 {
		return nil, &notLazy{reasonPlain, errors.New("the layer is not encrypted")}
	}
	var failure error
	for _, desc := range list {
		layer := newLazyLayer(desc)
		err := m.unwrapLazy(ctx, layer)
		if err == nil {
			err = m.pin(ctx, repo, layer)
		}
		if err == nil {
			m.lazy.add(layer)
			logrus.WithFields(ofLayer(desc)).WithFields(logrus.Fields{"image": repo.key(), "bytes": desc.Size, "trace": traceid.Of(ctx)}).Info("layer served lazily")
			return layer, nil
		}
		layer.clear()
		if failure == nil {
			failure = err
		}
	}
	return nil, failure
}

// Package mirror is a registry that one can only pull from, and that has encrypted images
// as plain ones: it restores the plain manifest, byte for byte, and decrypts each layer
// while it passes. It keeps no image: each answer needs the registry, and its consent.
//
// Who may read through it is what a [Config] says. An encrypted image that is requested by
// its own digest stays encrypted, since clients check digests; images that are not
// encrypted pass as they are.
package mirror

import (
	"context"
	"crypto/sha256"
	"net/http"
	"strings"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/singleflight"

	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/claims"
	"github.com/ctrlplane/pilot/internal/layerkeys"
	"github.com/ctrlplane/pilot/internal/mustencrypt"
	"github.com/ctrlplane/pilot/processor"
)

// Config says how a [Mirror] works.
type Config struct {
	// Keys are the key providers that unwrap layer keys.
	Keys processor.Keys
	// DecryptionKeysPath is a directory of private keys to try before Keys: see
	// [processor.KeyDir]. Default: none.
	DecryptionKeysPath string
	// Unavailable reports whether an error of a key provider means that it does not work
	// now, rather than that it refuses. May be nil.
	Unavailable func(error) bool
	// UnwrapTimeout bounds the wait for a layer key. Default: 40 seconds.
	UnwrapTimeout time.Duration

	// Upstream is the registry of all names, such as registry.example.com:5000, unless
	// a request names another with ?ns=. If it is empty, names without ns begin with
	// their registry, as in registry.example.com/team/app.
	Upstream string
	// AllowedUpstreams are patterns of the registries, besides Upstream, that are asked:
	// see [glob.MatchName]. Default: all, except those on loopback and link-local addresses
	// that neither Upstream nor HostsDir names.
	AllowedUpstreams []string
	// HostsDir is a directory in the form of containerd's certs.d that says how to
	// reach registries. Default: by https, and http on loopback.
	HostsDir string
	// Credentials returns the mirror's own credentials for a registry, as containerd
	// wants them. They are used for callers that send none. May be nil.
	Credentials func(ctx context.Context, registry string) (user, secret string, err error)

	// Clients are the CAs of the certificates with which callers may read. May be nil.
	Clients *certfile.Authorities
	// Secret is what callers without such a certificate have to know. If it is empty,
	// they may not read.
	Secret string

	// Streams is how many blobs are sent at once at most. Each takes up to six buffers
	// of [processor.BufferSize] bytes. Default: 32.
	Streams int
	// StallTimeout is how long a caller may take for [processor.BufferSize] bytes.
	// Default: 30 seconds.
	StallTimeout time.Duration
	// ManifestTimeout bounds how long a registry may take for a manifest or an index.
	// Default: one minute.
	ManifestTimeout time.Duration
	// Metrics is what the mirror's metrics are registered with. May be nil.
	Metrics prometheus.Registerer

	// Images are those of this machine's containerd, whose snapshotter may request parts
	// of their layers. May be nil: none. The mirror sets its Keep.
	Images *claims.Finder
	// LayerKeyLifetime returns for how long the key of a layer that the snapshotter reads is
	// used after a key provider gave it (0: no limit), and how much longer while key
	// providers are unavailable. Default: 10 seconds, and no longer.
	LayerKeyLifetime func() (ttl, grace time.Duration)
	// Record is where the mirror notes which keys have opened the layers of Images. May be
	// nil.
	Record *layerkeys.Record
	// Rules returns those of the setting must-be-encrypted, which go by Record. May be nil: none.
	Rules func() mustencrypt.Rules
}

const (
	defaultUnwrapTimeout = 40 * time.Second
	defaultStreams       = 32
	defaultStallTimeout  = 30 * time.Second
	// defaultManifestTimeout is that of the request for a manifest too.
	defaultManifestTimeout = time.Minute
	// maxConcurrentImages is how many plain images are made at once, and
	// maxRegistryImages how many of one registry. While others wait, one that takes longer
	// than imagePatience may be ended.
	maxConcurrentImages = 8
	maxRegistryImages   = 4
	imagePatience       = time.Minute
	// maxConcurrentDocuments is how many lists, and manifests that are not decrypted, are
	// in memory at once, of up to 8 MiB each. maxRegistryDocuments is how many of one
	// registry. While others wait, one that takes longer than documentPatience may be ended.
	maxConcurrentDocuments = 8
	maxRegistryDocuments   = 4
	documentPatience       = 10 * time.Second
	// maxConcurrentUnwraps is how many keys of an image are unwrapped at once.
	maxConcurrentUnwraps = 8
)

// Mirror is a handler of the pull half of the registry API:
// https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#endpoints.
// It is safe for concurrent use.
type Mirror struct {
	conf      Config
	secret    [sha256.Size]byte
	keyDir    *processor.KeyDir
	upstreams upstreams
	images    images
	searches  searches
	makes     singleflight.Group // of plain images
	making    turns              // of plain images
	documents turns              // of lists, and of manifests that are passed on
	streams   *streams
	metrics   *metrics
	lazy      *lazy // nil if there is no containerd
	handler   http.Handler
}

// New returns a mirror.
func New(conf Config) *Mirror {
	if conf.UnwrapTimeout <= 0 {
		conf.UnwrapTimeout = defaultUnwrapTimeout
	}
	if conf.Streams <= 0 {
		conf.Streams = defaultStreams
	}
	if conf.LayerKeyLifetime == nil {
		conf.LayerKeyLifetime = func() (ttl, grace time.Duration) { return keysTTL, 0 }
	}
	if conf.StallTimeout <= 0 {
		conf.StallTimeout = defaultStallTimeout
	}
	if conf.ManifestTimeout <= 0 {
		conf.ManifestTimeout = defaultManifestTimeout
	}
	m := &Mirror{
		conf:      conf,
		secret:    sha256.Sum256([]byte(conf.Secret)),
		keyDir:    processor.NewKeyDir(conf.DecryptionKeysPath, nil),
		making:    turns{most: maxConcurrentImages, registryMost: maxRegistryImages, patience: imagePatience},
		documents: turns{most: maxConcurrentDocuments, registryMost: maxRegistryDocuments, patience: documentPatience},
		streams:   newStreams(conf.Streams),
		metrics:   newMetrics(conf.Metrics),
		lazy:      newLazy(conf),
	}
	m.upstreams.init(conf)
	// It makes a span of each request, in the caller's trace if there is one.
	m.handler = otelhttp.NewHandler(http.HandlerFunc(m.serve), "mirror")
	return m
}

// ServeHTTP answers a request.
func (m *Mirror) ServeHTTP(w http.ResponseWriter, r *http.Request) { m.handler.ServeHTTP(w, r) }

func (m *Mirror) serve(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	r = r.WithContext(ctx)
	out := &answer{ResponseWriter: w, stall: m.conf.StallTimeout, cancel: cancel}
	kind := "other"
	defer func() { m.metrics.requests.WithLabelValues(kind, out.code()).Inc() }()
	if r.ContentLength != 0 {
		// The server reads a body before it answers, without a limit of time.
		_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout))
		w.Header().Set("Connection", "close")
	}

	c, ok := m.identify(r)
	if !ok {
		m.challenge(w)
		w.Header().Set("Connection", "close") // it is not for those who only hold it
		out.refuse(http.StatusUnauthorized, "UNAUTHORIZED", "the mirror does not know the caller: it takes "+m.accepted())
		return
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		out.refuse(http.StatusMethodNotAllowed, "UNSUPPORTED", "this registry is a mirror to pull from: push to the registry itself")
		return
	}
	if r.ContentLength != 0 {
		// The deadline would end a long answer too.
		out.refuse(http.StatusBadRequest, "UNSUPPORTED", "a request to a mirror has no body")
		return
	}
	if m.upstreams.isOwn(r.Header) {
		out.refuse(http.StatusLoopDetected, "UNSUPPORTED", "the mirror's own request has come back to it: its hosts directory must not name the mirror")
		return
	}
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	if r.URL.Path == "/v2/" || r.URL.Path == "/v2" {
		kind = "ping"
		if c.mayAsk() {
			// Callers that have credentials for the registry learn where to put them.
			m.challenge(w)
		}
		out.json("application/json", []byte("{}"))
		return
	}
	if path, ok := strings.CutPrefix(r.URL.Path, lazyPath); ok && c.trusted {
		kind = "lazy"
		m.serveLazy(out, r, c, path)
		return
	}
	t, err := m.parse(r)
	if err != nil {
		m.fail(out, r, c, target{}, err)
		return
	}
	kind, out.registry = t.kind, t.registry
	if err := m.answer(out, r, c, t); err != nil {
		if out.ended.Load() {
			err = errSlow // which the error may not say
		}
		m.fail(out, r, c, t, err)
	}
}

// quiet is a log for errors alone.
var quiet = func() *log.Entry {
	l := logrus.New()
	l.SetLevel(logrus.ErrorLevel)
	return logrus.NewEntry(l)
}()

// answer answers a request about t.
func (m *Mirror) answer(w *answer, r *http.Request, c caller, t target) error {
	// containerd's client logs what each host answers, which is in errors if it matters.
	r = r.WithContext(log.WithLogger(r.Context(), quiet))
	repo, err := m.open(r.Context(), c, t)
	if err != nil {
		return err
	}
	switch t.kind {
	case "manifests":
		return m.manifest(w, r, repo)
	case "blobs":
		return m.blob(w, r, repo)
	default:
		return m.list(w, r, repo)
	}
}

// unwrap unwraps the key of an encrypted layer. The caller clears it.
func (m *Mirror) unwrap(ctx context.Context, layer ocispec.Descriptor) (*processor.LayerKey, error) {
	within, cancel := context.WithTimeout(ctx, m.conf.UnwrapTimeout)
	defer cancel()
	key, err := m.keyDir.Unwrap(within, m.conf.Keys, layer)
	if err != nil {
		return nil, &layerError{layer: layer, key: true, err: err}
	}
	return key, nil
}

// checkKeys checks that all keys of the layers can be unwrapped now.
func (m *Mirror) checkKeys(ctx context.Context, layers map[digest.Digest]ocispec.Descriptor) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(maxConcurrentUnwraps)
	for _, layer := range layers {
		g.Go(func() error {
			key, err := m.unwrap(ctx, layer)
			if err == nil {
				key.Clear()
			}
			return err
		})
	}
	return g.Wait()
}

package mirror

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"

	"github.com/ctrlplane/pilot/internal/traceid"
)

// notLazy is the error of a layer that containerd has to pull as a whole, which the answer
// 404 makes it do.
type notLazy struct {
	reason string // in metrics
	err    error
}

func (e *notLazy) Error() string { return e.err.Error() }
func (e *notLazy) Unwrap() error { return e.err }

// The reasons for which layers are pulled as a whole.
const (
	reasonUnknown    = "no manifest"
	reasonPlain      = "plain"
	reasonNotSealed  = "not sealed"
	reasonTampered   = "tampered"
	reasonClaim      = "diff ID"
	reasonProving    = "being read"
	reasonTailSize   = "large table of contents"
	reasonDenied     = "denied"
	reasonKeys       = "keys unavailable"
	reasonRegistry   = "registry"
	reasonContainerd = "containerd"
	reasonRecord     = "not recorded"
)

var lazyReasons = []string{reasonUnknown, reasonPlain, reasonNotSealed, reasonTampered, reasonClaim, reasonProving, reasonTailSize, reasonDenied, reasonKeys, reasonRegistry, reasonContainerd, reasonRecord}

// imagesError is the error of a containerd that does not say which images it has.
type imagesError struct{ err error }

func (e *imagesError) Error() string { return "containerd's images: " + e.err.Error() }
func (e *imagesError) Unwrap() error { return e.err }

// mountError is the error of a request that the snapshotter makes before it mounts a layer.
// The layer is pulled as a whole then.
type mountError struct{ error }

func (e *mountError) Unwrap() error { return e.error }

// judgeLazy returns what an error means.
func (m *Mirror) judgeLazy(err error) verdict {
	if err == nil {
		return verdict{}
	}
	if _, ok := errors.AsType[*notLazy](err); ok {
		return verdict{http.StatusNotFound, "BLOB_UNKNOWN", codes.FailedPrecondition}
	}
	_, mounts := errors.AsType[*mountError](err)
	if _, ok := errors.AsType[*imagesError](err); errors.Is(err, errProving) || ok && !errors.Is(err, context.Canceled) {
		if ok && mounts {
			// containerd waits for the answer, and may not answer itself before that.
			return verdict{http.StatusNotFound, "BLOB_UNKNOWN", codes.Unavailable}
		}
		return verdict{http.StatusServiceUnavailable, "UNAVAILABLE", codes.Unavailable}
	}
	v := m.judge(err)
	if v.status == http.StatusForbidden {
		v.status = http.StatusNotFound // 403 makes the snapshotter begin anew
	}
	return v
}

// reasonOf returns the reason of a failure, for metrics.
func (m *Mirror) reasonOf(err error) string {
	if not, ok := errors.AsType[*notLazy](err); ok {
		return not.reason
	}
	if _, ok := errors.AsType[*imagesError](err); ok {
		return reasonContainerd
	}
	if errors.Is(err, errProving) {
		return reasonProving
	}
	if layer, ok := errors.AsType[*layerError](err); ok && layer.key {
		if m.judge(err).status == http.StatusServiceUnavailable {
			return reasonKeys
		}
		return reasonDenied
	}
	return reasonRegistry
}

// failureKey is a failure of a layer.
type failureKey struct {
	layer  digest.Digest
	mounts bool
	starts bool // a container needs it, which is mounted
	reason string
}

// first reports whether a failure was not noted for a while, and notes it.
func (l *lazy) first(key failureKey) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.noted[key]) < noteTTL {
		return false
	}
	if len(l.noted) >= maxNoted {
		clear(l.noted)
	}
	l.noted[key] = time.Now()
	return true
}

// failLazy answers with an error. What is the matter with a layer is logged and counted once
// in a while, since the snapshotter repeats its requests.
func (m *Mirror) failLazy(w *answer, r *http.Request, c caller, t target, err error) {
	v := m.judgeLazy(err)
	_, isRequest := errors.AsType[*requestError](err)
	if v.result != codes.Canceled && !isRequest && m.lazy != nil {
		_, mounts := errors.AsType[*mountError](err)
		key := failureKey{t.digest(), mounts, mounts && r.URL.Query().Get("for") == "container", m.reasonOf(err)}
		if m.lazy.first(key) {
			log := logrus.WithError(shown(err)).WithFields(logrus.Fields{"digest": key.layer, "image": t.key(), "reason": key.reason, "trace": traceid.Of(r.Context())})
			switch {
			case key.starts:
				log.Warn("lazily pulled layer can't be used: no container of it starts")
			case mounts && (key.reason == reasonPlain || key.reason == reasonNotSealed):
				log.Info("layer not lazy: it is pulled as a whole")
			case mounts:
				log.Warn("layer not lazy: it is pulled as a whole")
			default:
				log.Warn("read of a lazily pulled layer failed")
			}
			// Nothing is pulled for a container, but alerts go by layers that were changed.
			if mounts && (!key.starts || key.reason == reasonTampered || key.reason == reasonClaim) {
				m.lazy.metrics.fullPulls.WithLabelValues(key.reason).Inc()
			}
		}
	}
	m.respond(w, r, c, t, v, err)
}

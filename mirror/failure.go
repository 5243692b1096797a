package mirror

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/image/registry"
	"github.com/ctrlplane/pilot/internal/traceid"
	"github.com/ctrlplane/pilot/internal/verified"
	"github.com/ctrlplane/pilot/processor"
)

// requestError is the error of a request that can't be answered whatever the registry has.
type requestError struct {
	status  int
	code    string
	message string
}

func (e *requestError) Error() string { return e.message }

// layerError is the error of a layer that was not decrypted.
type layerError struct {
	layer ocispec.Descriptor
	// key says that its key was not unwrapped. Otherwise it was not decrypted to its end.
	key bool
	err error
}

func (e *layerError) Error() string { return fmt.Sprintf("layer %s: %s", e.layer.Digest, e.err) }
func (e *layerError) Unwrap() error { return e.err }

// errBusy is the error of a blob that has waited too long for its turn.
var errBusy = errors.New("the mirror sends as many blobs as it may: try again")

// verdict is what an error means: to the caller, and in metrics.
type verdict struct {
	status int
	code   string // of the distribution specification
	result codes.Code
}

// judge returns what an error means.
func (m *Mirror) judge(err error) verdict {
	var request *requestError
	var layer *layerError
	var upstream remoteerrors.ErrUnexpectedStatus
	var network net.Error
	key := errors.As(err, &layer) && layer.key
	switch {
	case errors.As(err, &request):
		return verdict{request.status, request.code, codes.InvalidArgument}
	case errors.Is(err, context.Canceled) || errors.Is(err, errCaller):
		return verdict{499, "UNKNOWN", codes.Canceled} // nobody reads it
	case key && (errors.Is(err, context.DeadlineExceeded) || m.conf.Unavailable != nil && m.conf.Unavailable(err)):
		return verdict{http.StatusServiceUnavailable, "UNAVAILABLE", codes.Unavailable}
	case errors.Is(err, processor.ErrNoKey):
		return verdict{http.StatusForbidden, "DENIED", codes.FailedPrecondition}
	case errors.Is(err, processor.ErrTampered) || errors.Is(err, verified.ErrDigest):
		return verdict{http.StatusBadGateway, "DIGEST_INVALID", codes.DataLoss}
	case key || errors.Is(err, image.ErrLimit) || errors.Is(err, registry.ErrTooLarge) || errors.Is(err, errNoList):
		return verdict{http.StatusBadGateway, "MANIFEST_INVALID", codes.InvalidArgument}
	case errors.Is(err, errOutOfReach):
		return verdict{http.StatusForbidden, "DENIED", codes.PermissionDenied}
	case errors.Is(err, errBusy) || errors.Is(err, errSlow):
		return verdict{http.StatusServiceUnavailable, "TOOMANYREQUESTS", codes.ResourceExhausted}
	case errors.Is(err, docker.ErrInvalidAuthorization):
		return verdict{http.StatusUnauthorized, "UNAUTHORIZED", codes.PermissionDenied}
	case errors.As(err, &upstream):
		return judgeStatus(upstream.StatusCode)
	case errdefs.IsNotFound(err):
		return verdict{http.StatusNotFound, "", codes.NotFound}
	case errors.Is(err, context.DeadlineExceeded) || errors.As(err, &network) && network.Timeout():
		return verdict{http.StatusGatewayTimeout, "UNAVAILABLE", codes.Unavailable}
	}
	return verdict{http.StatusBadGateway, "UNAVAILABLE", codes.Unavailable}
}

// shown returns an error without the query of a URL, in which a registry's storage has
// tokens.
func shown(err error) error {
	var layer *layerError
	var status remoteerrors.ErrUnexpectedStatus
	var request *url.Error
	switch {
	case errors.As(err, &layer) && layer.key:
		return err // no registry's
	case errors.As(err, &status):
		var said docker.Errors
		plain := fmt.Errorf("%s returned %s", withoutQuery(status.RequestURL), status.Status)
		if errors.As(err, &said) {
			plain = fmt.Errorf("%w: %w", plain, said)
		}
		return plain
	case errors.As(err, &request):
		return fmt.Errorf("%s: %w", withoutQuery(request.URL), request.Err)
	}
	return err
}

func withoutQuery(text string) string {
	u, err := url.Parse(text)
	if err != nil {
		return "the registry"
	}
	u.RawQuery = ""
	return u.Redacted()
}

// judgeStatus returns what a registry's status means.
func judgeStatus(status int) verdict {
	switch status {
	case http.StatusUnauthorized:
		return verdict{status, "UNAUTHORIZED", codes.PermissionDenied}
	case http.StatusForbidden:
		return verdict{status, "DENIED", codes.PermissionDenied}
	case http.StatusNotFound:
		return verdict{status, "", codes.NotFound}
	case http.StatusTooManyRequests:
		return verdict{status, "TOOMANYREQUESTS", codes.ResourceExhausted}
	}
	return verdict{http.StatusBadGateway, "UNAVAILABLE", codes.Unavailable}
}

// notFound are the codes of what a registry does not have.
var notFound = map[string]string{"manifests": "MANIFEST_UNKNOWN", "blobs": "BLOB_UNKNOWN", "tags": "NAME_UNKNOWN", "referrers": "NAME_UNKNOWN"}

// retryAfter is when callers try again after a failure that may pass.
const retryAfter = 5 * time.Second

// fail answers with an error, or, if the answer has begun, breaks the connection off: the
// caller must not take a part for the whole.
func (m *Mirror) fail(w *answer, r *http.Request, c caller, t target, err error) {
	v := m.judge(err)
	m.log(r, t, v, err)
	m.respond(w, r, c, t, v, err)
}

// respond answers with an error that is logged.
func (m *Mirror) respond(w *answer, r *http.Request, c caller, t target, v verdict, err error) {
	if w.status != 0 || v.result == codes.Canceled {
		panic(http.ErrAbortHandler)
	}
	message := shown(err).Error()
	if id := traceid.Of(r.Context()); id != "" {
		message += " (trace " + id + ")"
	}
	switch v.status {
	case http.StatusUnauthorized:
		// A caller whose password is the mirror's secret would take it for a wrong one.
		if c.password {
			v.status, v.code = http.StatusForbidden, "DENIED"
			break
		}
		m.challenge(w)
	case http.StatusNotFound:
		if v.code == "" {
			v.code = notFound[t.kind]
		}
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		if _, mounts := errors.AsType[*mountError](err); mounts {
			break // containerd waits for the snapshotter meanwhile, and has its own way to pull
		}
		wait := retryAfter
		if u, err := m.upstreams.of(c, t.registry); err == nil && v.status == http.StatusTooManyRequests {
			wait = max(u.throttle.left(), time.Second)
		}
		w.Header().Set("Retry-After", strconv.Itoa(int((wait+time.Second-1)/time.Second)))
	}
	w.ended.Store(false) // what was slow may have been the registry
	w.refuse(v.status, v.code, message)
}

// log logs a failure. Those of layers are what the differ logs too.
func (m *Mirror) log(r *http.Request, t target, v verdict, err error) {
	log := logrus.WithError(shown(err))
	switch t.kind {
	case "manifests", "blobs":
		log = log.WithField("image", t.reference())
	case "tags", "referrers":
		log = log.WithField("repository", t.key())
	}
	if id := traceid.Of(r.Context()); id != "" {
		log = log.WithField("trace", id)
	}
	var layer *layerError
	switch {
	case v.result == codes.Canceled:
		return
	case errors.As(err, &layer):
		log.WithFields(ofLayer(layer.layer)).Warn("layer not decrypted")
	case v.result == codes.NotFound || v.result == codes.InvalidArgument:
		log.Debug("request to the mirror failed")
	default:
		log.Warn("request to the mirror failed")
	}
}

func ofLayer(layer ocispec.Descriptor) logrus.Fields {
	fields := logrus.Fields{"digest": layer.Digest}
	if keks := processor.KEKs(layer); keks != "" {
		fields["kek"] = keks
	}
	return fields
}

package keyprovider

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/sirupsen/logrus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"

	"github.com/ctrlplane/pilot/internal/traceid"
)

// done counts, logs and traces what was done with a layer key. A line for each would fill
// a busy node's log, so the level is debug: see [Metrics.LogUses].
func (p *Provider) done(ctx context.Context, operation, kek string, version int, method string, start time.Time) {
	if !isProbe(ctx) {
		p.metrics.uses.add(operation, kek)
	}
	what := "layer key unwrapped"
	if operation == opWrap {
		what = "layer key wrapped"
	}
	if logrus.IsLevelEnabled(logrus.DebugLevel) {
		logOf(ctx).WithFields(logrus.Fields{
			"kek": kek, "version": version, "method": method, "took": time.Since(start),
		}).Debug(what)
	}
	span := trace.SpanFromContext(ctx)
	if !span.IsRecording() {
		return
	}
	facts := []attribute.KeyValue{
		attribute.String("pilot.kek.id", kek), attribute.Int("pilot.kek.version", version), attribute.String("pilot.method", method),
	}
	span.SetAttributes(facts...)
	span.AddEvent(what, trace.WithAttributes(facts...)) // there may be several
}

// traced is a broker's error, with the trace of the request that caused it.
type traced struct {
	error
	trace string
}

func (t *traced) Unwrap() error { return t.error }

// inTrace adds to a remembered error the trace of the request that got it, by which the
// broker's audit log knows that request.
func inTrace(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if t := new(traced); errors.As(err, &t) && t.trace != "" && t.trace != traceid.Of(ctx) {
		return fmt.Errorf("%w (requested in trace %s)", err, t.trace)
	}
	return err
}

// logOf returns the logger of a request, with its trace.
func logOf(ctx context.Context) *logrus.Entry {
	log := logrus.NewEntry(logrus.StandardLogger())
	if id := traceid.Of(ctx); id != "" {
		return log.WithField("trace", id)
	}
	return log
}

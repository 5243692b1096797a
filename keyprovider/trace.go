package keyprovider

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/sirupsen/logrus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
)

// done tells the log and the trace what was done with a layer key.
func done(ctx context.Context, what, kek string, version int, method string, start time.Time) {
	logOf(ctx).WithFields(logrus.Fields{
		"kek": kek, "version": version, "method": method, "took": time.Since(start),
	}).Info(what)
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

// traced is a broker's error, with the trace of the request that had it asked.
type traced struct {
	error
	trace string
}

func (t *traced) Unwrap() error { return t.error }

// inTrace has an error that another request was given, and that is remembered, name
// that one's trace: the broker's audit log knows the request by it.
func inTrace(ctx context.Context, err error) error {
	if t := new(traced); errors.As(err, &t) && t.trace != "" && t.trace != traceOf(ctx) {
		return fmt.Errorf("%w (requested in trace %s)", err, t.trace)
	}
	return err
}

// traceOf returns the ID of the context's trace, or "".
func traceOf(ctx context.Context) string {
	if s := trace.SpanContextFromContext(ctx); s.HasTraceID() {
		return s.TraceID().String()
	}
	return ""
}

// logOf has log lines tell the trace that they belong to.
func logOf(ctx context.Context) *logrus.Entry {
	log := logrus.NewEntry(logrus.StandardLogger())
	if s := trace.SpanContextFromContext(ctx); s.HasTraceID() {
		return log.WithField("trace", s.TraceID())
	}
	return log
}

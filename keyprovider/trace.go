package keyprovider

import (
	"context"
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

// logOf has log lines tell the trace that they belong to.
func logOf(ctx context.Context) *logrus.Entry {
	log := logrus.NewEntry(logrus.StandardLogger())
	if s := trace.SpanContextFromContext(ctx); s.HasTraceID() {
		return log.WithField("trace", s.TraceID())
	}
	return log
}

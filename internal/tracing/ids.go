package tracing

import (
	"context"
	"encoding/binary"
	"math/rand/v2"

	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

// idProvider makes spans that have IDs and record nothing, for a program without a
// collector. A root span is sampled, as the SDK's are, so that a server that has a
// collector still records its part.
type idProvider struct{ noop.TracerProvider }

func (idProvider) Tracer(string, ...trace.TracerOption) trace.Tracer { return idTracer{} }

type idTracer struct{ noop.Tracer }

func (idTracer) Start(ctx context.Context, _ string, _ ...trace.SpanStartOption) (context.Context, trace.Span) {
	parent := trace.SpanContextFromContext(ctx)
	config := trace.SpanContextConfig{TraceID: parent.TraceID(), TraceFlags: parent.TraceFlags(), TraceState: parent.TraceState()}
	if !parent.IsValid() {
		config.TraceFlags = trace.FlagsSampled
		for !config.TraceID.IsValid() {
			binary.NativeEndian.PutUint64(config.TraceID[:8], rand.Uint64())
			binary.NativeEndian.PutUint64(config.TraceID[8:], rand.Uint64())
		}
	}
	for !config.SpanID.IsValid() {
		binary.NativeEndian.PutUint64(config.SpanID[:], rand.Uint64())
	}
	ctx = trace.ContextWithSpanContext(ctx, trace.NewSpanContext(config))
	return ctx, trace.SpanFromContext(ctx)
}

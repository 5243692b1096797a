package client

import (
	"context"
	"net/http"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// startSpan begins the span of a request to a broker.
func startSpan(ctx context.Context, b *endpoint, r request) (context.Context, trace.Span) {
	return otel.Tracer("github.com/ctrlplane/pilot/copilot/client").Start(ctx, "copilot "+r.name,
		trace.WithSpanKind(trace.SpanKindClient), trace.WithAttributes(
			attribute.String("http.request.method", r.method), attribute.String("server.address", b.url)))
}

// passOn makes the broker's spans children of ctx's span.
func passOn(ctx context.Context, h http.Header) {
	otel.GetTextMapPropagator().Inject(ctx, propagation.HeaderCarrier(h))
}

func endSpan(span trace.Span, err error) {
	if err != nil {
		span.SetStatus(codes.Error, err.Error())
	}
	span.End()
}

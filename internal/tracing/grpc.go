package tracing

import (
	"context"
	"strings"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// UnaryServer returns an interceptor that makes a span of each call of a gRPC server,
// except health checks. The span is part of the caller's trace, if the caller's
// metadata name one. Every error is that of the span: OpenTelemetry's otelgrpc leaves
// out the reason why a key was refused (NotFound, PermissionDenied), as in general
// those are not a server's errors.
func UnaryServer() grpc.UnaryServerInterceptor {
	tracer := otel.Tracer("github.com/ctrlplane/pilot/tracing")
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
		if strings.HasPrefix(info.FullMethod, "/"+healthpb.Health_ServiceDesc.ServiceName+"/") {
			return handle(ctx, req)
		}
		ctx = withCaller(ctx)
		method := strings.TrimPrefix(info.FullMethod, "/")
		ctx, span := tracer.Start(ctx, method, trace.WithSpanKind(trace.SpanKindServer))
		if !span.IsRecording() {
			return handle(ctx, req)
		}
		defer span.End()
		span.SetAttributes(attribute.String("rpc.system.name", "grpc"), attribute.String("rpc.method", method))
		response, err := handle(ctx, req)
		span.SetAttributes(attribute.String("rpc.response.status_code", status.Code(err).String()))
		if err != nil {
			span.SetStatus(codes.Error, status.Convert(err).Message())
		}
		return response, err
	}
}

// withCaller returns ctx with the trace that the caller's metadata name.
func withCaller(ctx context.Context) context.Context {
	propagator := otel.GetTextMapPropagator()
	var caller propagation.MapCarrier
	for _, field := range propagator.Fields() {
		if values := metadata.ValueFromIncomingContext(ctx, field); len(values) > 0 {
			if caller == nil {
				caller = propagation.MapCarrier{}
			}
			caller[field] = values[0]
		}
	}
	if caller == nil {
		return ctx
	}
	return propagator.Extract(ctx, caller)
}

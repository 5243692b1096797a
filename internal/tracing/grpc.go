package tracing

import (
	"context"
	"strings"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// UnaryServer returns what makes a span of each call that a gRPC server
// answers, but for those that ask for its health. It is part of the caller's
// trace, if the caller's metadata say which.
func UnaryServer() grpc.UnaryServerInterceptor {
	tracer := otel.Tracer("github.com/ctrlplane/pilot/tracing")
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
		if strings.HasPrefix(info.FullMethod, "/"+healthpb.Health_ServiceDesc.ServiceName+"/") {
			return handle(ctx, req)
		}
		incoming, _ := metadata.FromIncomingContext(ctx)
		ctx = otel.GetTextMapPropagator().Extract(ctx, carrier(incoming))
		method := strings.TrimPrefix(info.FullMethod, "/")
		ctx, span := tracer.Start(ctx, method, trace.WithSpanKind(trace.SpanKindServer), trace.WithAttributes(
			attribute.String("rpc.system.name", "grpc"), attribute.String("rpc.method", method)))
		defer span.End()
		answer, err := handle(ctx, req)
		span.SetAttributes(attribute.String("rpc.response.status_code", status.Code(err).String()))
		if err != nil {
			span.SetStatus(codes.Error, status.Convert(err).Message())
		}
		return answer, err
	}
}

// carrier is metadata as [propagation.TextMapCarrier].
type carrier metadata.MD

func (c carrier) Get(key string) string {
	if values := metadata.MD(c).Get(key); len(values) > 0 {
		return values[0]
	}
	return ""
}

func (c carrier) Set(key, value string) { metadata.MD(c).Set(key, value) }

func (c carrier) Keys() []string {
	keys := make([]string, 0, len(c))
	for key := range c {
		keys = append(keys, key)
	}
	return keys
}

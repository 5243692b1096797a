package keyprovider

import (
	"context"

	"google.golang.org/grpc/metadata"
)

// probeKey is the gRPC metadata of requests that only try whether pilot works.
const probeKey = "pilot-probe"

type probeContext struct{}

// Probe returns a context whose requests over gRPC only try whether a key provider works:
// those that fail are no warnings in its log, and its metrics count none.
func Probe(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, probeKey, "1")
}

// withProbe takes up what [Probe] said at the other end.
func withProbe(ctx context.Context) context.Context {
	if len(metadata.ValueFromIncomingContext(ctx, probeKey)) > 0 {
		return context.WithValue(ctx, probeContext{}, true)
	}
	return ctx
}

func isProbe(ctx context.Context) bool { return ctx.Value(probeContext{}) != nil }

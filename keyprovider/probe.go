package keyprovider

import (
	"context"

	"google.golang.org/grpc/metadata"
)

// probeKey is the gRPC metadata of requests that only check whether pilot works.
const probeKey = "pilot-probe"

type probeContext struct{}

// Probe returns a context for requests over gRPC that only check whether a key provider
// works: it does not log their failures as warnings, and its metrics do not count them.
func Probe(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, probeKey, "1")
}

// withProbe marks a request that was made with [Probe].
func withProbe(ctx context.Context) context.Context {
	if len(metadata.ValueFromIncomingContext(ctx, probeKey)) > 0 {
		return context.WithValue(ctx, probeContext{}, true)
	}
	return ctx
}

func isProbe(ctx context.Context) bool { return ctx.Value(probeContext{}) != nil }

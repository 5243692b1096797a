package keyprovider

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/ctrlplane/pilot/internal/fips"
)

// probeKey is the gRPC metadata of requests that only check whether pilot works.
const probeKey = "pilot-probe"

// FIPSKey is the gRPC metadata in which pilot answers a probe with its FIPS 140-3 module and
// mode, if it has one.
const FIPSKey = "pilot-fips140"

type probeContext struct{}

// Probe returns a context for requests over gRPC that only check whether a key provider
// works: it does not log their failures as warnings, and its metrics do not count them.
func Probe(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, probeKey, "1")
}

// withProbe marks a request that was made with [Probe], and sends FIPSKey.
func withProbe(ctx context.Context) context.Context {
	if len(metadata.ValueFromIncomingContext(ctx, probeKey)) > 0 {
		if mode := fips.Describe(); mode != "" {
			// It fails without a connection, as in a test.
			_ = grpc.SetHeader(ctx, metadata.Pairs(FIPSKey, mode))
		}
		return context.WithValue(ctx, probeContext{}, true)
	}
	return ctx
}

func isProbe(ctx context.Context) bool { return ctx.Value(probeContext{}) != nil }

package keyprovider

import (
	"context"
	"errors"

	ocicryptpb "github.com/containers/ocicrypt/utils/keyprovider"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/layerbudget"
)

// KeyProvider answers requests of ocicrypt's key provider protocol, in its JSON.
// It is a [Provider], or a client of one.
type KeyProvider interface {
	WrapKey(ctx context.Context, input []byte) ([]byte, error)
	UnwrapKey(ctx context.Context, input []byte) ([]byte, error)
}

// Register makes s answer keyprovider.KeyProviderService with p.
func Register(s grpc.ServiceRegistrar, p KeyProvider) {
	ocicryptpb.RegisterKeyProviderServiceServer(s, service{provider: p, layers: new(layerbudget.Layers)})
}

type service struct {
	ocicryptpb.UnimplementedKeyProviderServiceServer
	provider KeyProvider
	layers   *layerbudget.Layers
}

func (s service) WrapKey(ctx context.Context, in *ocicryptpb.KeyProviderKeyWrapProtocolInput) (*ocicryptpb.KeyProviderKeyWrapProtocolOutput, error) {
	return answer(ctx, in, s.provider.WrapKey)
}

func (s service) UnWrapKey(ctx context.Context, in *ocicryptpb.KeyProviderKeyWrapProtocolInput) (*ocicryptpb.KeyProviderKeyWrapProtocolOutput, error) {
	if ids := metadata.ValueFromIncomingContext(ctx, layerbudget.Header); len(ids) == 1 {
		ctx = s.layers.With(ctx, ids[0])
	}
	return answer(ctx, in, s.provider.UnwrapKey)
}

func answer(ctx context.Context, in *ocicryptpb.KeyProviderKeyWrapProtocolInput, op func(context.Context, []byte) ([]byte, error)) (*ocicryptpb.KeyProviderKeyWrapProtocolOutput, error) {
	defer clear(in.GetKeyProviderKeyWrapProtocolInput()) // it may hold a layer key, and nobody reads it any more
	ctx = withProbe(ctx)
	out, err := op(ctx, in.GetKeyProviderKeyWrapProtocolInput())
	if err != nil {
		// The caller may be a runtime that tells nobody, so say it here too.
		level := logrus.WarnLevel
		if isProbe(ctx) {
			level = logrus.DebugLevel
		}
		logOf(ctx).WithError(err).Log(level, "request failed")
		return nil, status.Error(code(err), err.Error())
	}
	return &ocicryptpb.KeyProviderKeyWrapProtocolOutput{KeyProviderKeyWrapProtocolOutput: out}, nil
}

// code returns the gRPC status code that says what err means to a caller.
func code(err error) codes.Code {
	switch {
	case err == nil:
		return codes.OK
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	case errors.Is(err, client.ErrUnavailable):
		return codes.Unavailable
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	case errors.Is(err, client.ErrForbidden):
		return codes.PermissionDenied
	case errors.Is(err, client.ErrNotFound):
		return codes.NotFound
	case errors.Is(err, ErrTooManyKeys):
		return codes.ResourceExhausted
	case errors.Is(err, ErrInput):
		return codes.InvalidArgument
	case errors.Is(err, ErrWrongKEK), errors.Is(err, client.ErrNotExported):
		return codes.FailedPrecondition
	case errors.Is(err, client.ErrRejected):
		return codes.InvalidArgument
	}
	return codes.Unknown
}

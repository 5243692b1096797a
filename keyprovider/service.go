package keyprovider

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	ocicrypt "github.com/containers/ocicrypt/keywrap/keyprovider"
	ocicryptpb "github.com/containers/ocicrypt/utils/keyprovider"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/keyjson"
	"github.com/ctrlplane/pilot/internal/layerbudget"
	"github.com/ctrlplane/pilot/internal/wireformat"
	"github.com/ctrlplane/pilot/processor"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
)

const defaultName = "pilot"

// Service serves a key provider to other programs in ocicrypt's key provider protocol.
type Service struct {
	// Provider wraps and unwraps. It is a [Provider], or one that replaces it.
	Provider processor.KeyProvider
	// Names are the key provider's in the ocicrypt.conf of its callers, which pass its
	// parameters by that name. Default: pilot.
	Names []string
	// CoCo wraps for the guests of Confidential Containers, if attestation-agent is among
	// Names: see [CoCo]. May be nil.
	CoCo processor.KeyProvider
	// Metrics count requests that are malformed. May be nil.
	Metrics *Metrics
}

// Register makes r answer keyprovider.KeyProviderService.
func (s *Service) Register(r grpc.ServiceRegistrar) {
	ocicryptpb.RegisterKeyProviderServiceServer(r, server{service: s, layers: new(layerbudget.Layers)})
}

// server is the service over gRPC.
type server struct {
	ocicryptpb.UnimplementedKeyProviderServiceServer
	service *Service
	layers  *layerbudget.Layers
}

func (s server) WrapKey(ctx context.Context, in *ocicryptpb.KeyProviderKeyWrapProtocolInput) (*ocicryptpb.KeyProviderKeyWrapProtocolOutput, error) {
	return s.answer(ctx, ocicryptclient.Wrap, in)
}

func (s server) UnWrapKey(ctx context.Context, in *ocicryptpb.KeyProviderKeyWrapProtocolInput) (*ocicryptpb.KeyProviderKeyWrapProtocolOutput, error) {
	if ids := metadata.ValueFromIncomingContext(ctx, layerbudget.Header); len(ids) == 1 {
		ctx = s.layers.With(ctx, ids[0])
	}
	return s.answer(ctx, ocicryptclient.Unwrap, in)
}

func (s server) answer(ctx context.Context, op ocicryptclient.Operation, in *ocicryptpb.KeyProviderKeyWrapProtocolInput) (*ocicryptpb.KeyProviderKeyWrapProtocolOutput, error) {
	defer clear(in.GetKeyProviderKeyWrapProtocolInput()) // it may hold a layer key
	ctx = withProbe(ctx)
	out, err := s.service.answer(ctx, op, in.GetKeyProviderKeyWrapProtocolInput(), isTonic(ctx))
	if err != nil {
		// The caller may be a runtime that reports it nowhere.
		level := logrus.WarnLevel
		if isProbe(ctx) {
			level = logrus.DebugLevel
		}
		logOf(ctx).WithError(err).Log(level, "request failed")
		return nil, status.Error(code(err), err.Error())
	}
	return &ocicryptpb.KeyProviderKeyWrapProtocolOutput{KeyProviderKeyWrapProtocolOutput: out}, nil
}

// answer answers a request in the JSON of the protocol: in its Rust dialect if the request
// is in that, or one to unwrap of a client in Rust. The caller clears both.
func (s *Service) answer(ctx context.Context, op ocicryptclient.Operation, input []byte, isRust bool) ([]byte, error) {
	start := time.Now()
	in, numbers, err := decodeInput(input, op)
	if err != nil {
		if s.Metrics != nil {
			s.Metrics.request(ctx, operations[op], start, err)
		}
		return nil, err
	}
	if op == ocicryptclient.Wrap {
		return s.wrap(ctx, in.KeyWrapParams, numbers)
	}
	return s.unwrap(ctx, in.KeyUnwrapParams, isRust)
}

// operations are what metrics call the operations.
var operations = map[ocicryptclient.Operation]string{ocicryptclient.Wrap: opWrap, ocicryptclient.Unwrap: opUnwrap}

func (s *Service) wrap(ctx context.Context, in ocicrypt.KeyWrapParams, numbers bool) ([]byte, error) {
	defer clear(in.OptsData)
	provider, params := s.Provider, s.own(in.Ec.Parameters)
	if coco := in.Ec.Parameters[wireformat.CoCoProvider]; len(coco) > 0 && s.CoCo != nil && slices.Contains(s.names(), wireformat.CoCoProvider) {
		if len(params) > 0 {
			return nil, fmt.Errorf("%w: recipients are named for %[2]s and for another name of pilot's, and a request does not say which of the two is called: have ocicrypt.conf run \"pilot keyprovider --provider-name %[2]s\" for %[2]s",
				ErrInput, wireformat.CoCoProvider)
		}
		provider, params = s.CoCo, coco
	}
	annotation, err := provider.WrapKey(ctx, params, in.OptsData)
	if errors.Is(err, errNoKEK) {
		return nil, fmt.Errorf("%w%s", err, s.otherNames(in.Ec.Parameters))
	}
	if err != nil {
		return nil, err
	}
	if numbers {
		return numbersIn("keywrapresults", "annotation", annotation), nil
	}
	return json.Marshal(ocicrypt.KeyProviderKeyWrapProtocolOutput{KeyWrapResults: ocicrypt.KeyWrapResults{Annotation: annotation}})
}

func (s *Service) unwrap(ctx context.Context, in ocicrypt.KeyUnwrapParams, numbers bool) ([]byte, error) {
	var params [][]byte
	if in.Dc != nil {
		params = s.own(in.Dc.Parameters)
	}
	layerKey, err := s.Provider.UnwrapKey(ctx, params, in.Annotation)
	if err != nil {
		return nil, err
	}
	defer clear(layerKey)
	if numbers {
		return numbersIn("keyunwrapresults", "optsdata", layerKey), nil
	}
	results := keyjson.Object(keyjson.Key("optsdata", layerKey))
	defer clear(results)
	return keyjson.Object(noWrapResults, keyjson.Raw("keyunwrapresults", results)), nil
}

// noWrapResults is the member of an answer that it has without a result, too.
var noWrapResults = keyjson.Value("keywrapresults", ocicrypt.KeyWrapResults{})

func (s *Service) names() []string {
	if len(s.Names) == 0 {
		return []string{defaultName}
	}
	return s.Names
}

// own returns the key provider's own parameters, without those of attestation-agent.
// ocicrypt passes those of all key providers, and does not say by which name it found this
// one.
func (s *Service) own(params map[string][][]byte) (own [][]byte) {
	for _, name := range s.names() {
		if name == wireformat.CoCoProvider {
			continue
		}
		own = append(own, params[name]...)
	}
	return own
}

// notProviders are ocicrypt's parameters that are for no key provider.
var notProviders = []string{"pubkeys", "x509s", "gpg-recipients", "gpg-pubkeyringfile", "pkcs11-pubkeys", "pkcs11-yamls", "pkcs11-config"}

// otherNames says what to do if the caller seems to know pilot by another name.
func (s *Service) otherNames(params map[string][][]byte) string {
	for _, name := range slices.Sorted(maps.Keys(params)) {
		if !slices.Contains(s.names(), name) && !slices.Contains(notProviders, name) {
			return fmt.Sprintf(", or add %.60q to provider-name if pilot has that name in ocicrypt.conf", name)
		}
	}
	return ""
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
	case errors.Is(err, processor.ErrDenied):
		return codes.PermissionDenied
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

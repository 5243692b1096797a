package keyprovider

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	ocicrypt "github.com/containers/ocicrypt/keywrap/keyprovider"
	ocicryptpb "github.com/containers/ocicrypt/utils/keyprovider"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

// maxInput bounds the JSON of one request, in bytes: gRPC's own bound.
const maxInput = 4 << 20

// Exec is ocicrypt's key provider as an executable: it reads one request from
// r, does what its op says with p, and writes the answer to w.
func Exec(ctx context.Context, p *Provider, r io.Reader, w io.Writer) error {
	return exec(r, w, func(op ocicrypt.KeyProviderKeyWrapProtocolOperation, input []byte) ([]byte, error) {
		ctx, cancel := context.WithTimeout(ctx, answerWithin)
		defer cancel()
		if op == ocicrypt.OpKeyWrap {
			return p.WrapKey(ctx, input)
		}
		return p.UnwrapKey(ctx, input)
	})
}

// Forward is Exec with the key provider that answers on conn.
func Forward(ctx context.Context, conn grpc.ClientConnInterface, r io.Reader, w io.Writer) error {
	client := ocicryptpb.NewKeyProviderServiceClient(conn)
	return exec(r, w, func(op ocicrypt.KeyProviderKeyWrapProtocolOperation, input []byte) ([]byte, error) {
		ctx, cancel := context.WithTimeout(ctx, answerWithin)
		defer cancel()
		call := client.UnWrapKey
		if op == ocicrypt.OpKeyWrap {
			call = client.WrapKey
		}
		out, err := call(ctx, &ocicryptpb.KeyProviderKeyWrapProtocolInput{KeyProviderKeyWrapProtocolInput: input})
		if err != nil {
			return nil, fmt.Errorf("the daemon says: %s", status.Convert(err).Message())
		}
		return out.GetKeyProviderKeyWrapProtocolOutput(), nil
	})
}

func exec(r io.Reader, w io.Writer, do func(ocicrypt.KeyProviderKeyWrapProtocolOperation, []byte) ([]byte, error)) error {
	input, err := io.ReadAll(io.LimitReader(r, maxInput+1))
	if err != nil {
		return fmt.Errorf("read the request: %w", err)
	}
	defer clear(input)
	if len(input) > maxInput {
		return fmt.Errorf("%w: it has more than %d bytes", ErrInput, maxInput)
	}
	var in struct {
		Op ocicrypt.KeyProviderKeyWrapProtocolOperation `json:"op"`
	}
	if json.Unmarshal(input, &in) != nil || in.Op != ocicrypt.OpKeyWrap && in.Op != ocicrypt.OpKeyUnwrap {
		return fmt.Errorf("%w: standard input has to be a request of ocicrypt's key provider protocol, with op %q or %q", ErrInput, ocicrypt.OpKeyWrap, ocicrypt.OpKeyUnwrap)
	}
	out, err := do(in.Op, input)
	if err != nil {
		return err
	}
	defer clear(out)
	_, err = w.Write(out)
	return err
}

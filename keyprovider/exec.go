package keyprovider

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/ctrlplane/pilot/internal/keyjson"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
)

// maxInput bounds the JSON of one request, in bytes: gRPC's own bound.
const maxInput = 4 << 20

// Exec is the key provider as an executable: it reads one request of at most 4 MiB from
// r, does what its op says, and writes the answer to w.
func (s *Service) Exec(ctx context.Context, r io.Reader, w io.Writer) error {
	return execute(ctx, r, w, func(ctx context.Context, op ocicryptclient.Operation, input []byte) ([]byte, error) {
		return s.answer(ctx, op, input, false)
	})
}

// Forward is [Service.Exec] by another program, which gets the request and whose answer is
// written as they are.
func Forward(ctx context.Context, to *ocicryptclient.Client, r io.Reader, w io.Writer) error {
	return execute(ctx, r, w, to.Forward)
}

func execute(ctx context.Context, r io.Reader, w io.Writer, answer func(context.Context, ocicryptclient.Operation, []byte) ([]byte, error)) error {
	input, err := keyjson.ReadAll(io.LimitReader(r, maxInput+1))
	defer clear(input)
	if err != nil {
		return fmt.Errorf("read the request: %w", err)
	}
	if len(input) > maxInput {
		return fmt.Errorf("%w: it has more than %d bytes", ErrInput, maxInput)
	}
	var in struct {
		Op ocicryptclient.Operation `json:"op"`
	}
	if json.Unmarshal(input, &in) != nil || in.Op != ocicryptclient.Wrap && in.Op != ocicryptclient.Unwrap {
		return fmt.Errorf("%w: standard input has to be a request of ocicrypt's key provider protocol, with op %q or %q", ErrInput, ocicryptclient.Wrap, ocicryptclient.Unwrap)
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	out, err := answer(ctx, in.Op, input)
	if err != nil {
		return err
	}
	defer clear(out)
	_, err = w.Write(out)
	return err
}

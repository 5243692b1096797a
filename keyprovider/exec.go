package keyprovider

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	ocicrypt "github.com/containers/ocicrypt/keywrap/keyprovider"

	"github.com/ctrlplane/pilot/internal/keyjson"
)

// maxInput bounds the JSON of one request, in bytes: gRPC's own bound.
const maxInput = 4 << 20

// Exec is ocicrypt's key provider as an executable: it reads one request from
// r, has p do what its op says, and writes the answer to w.
func Exec(ctx context.Context, p KeyProvider, r io.Reader, w io.Writer) error {
	input, err := keyjson.ReadAll(io.LimitReader(r, maxInput+1))
	defer clear(input)
	if err != nil {
		return fmt.Errorf("read the request: %w", err)
	}
	if len(input) > maxInput {
		return fmt.Errorf("%w: it has more than %d bytes", ErrInput, maxInput)
	}
	var in struct {
		Op ocicrypt.KeyProviderKeyWrapProtocolOperation `json:"op"`
	}
	if json.Unmarshal(input, &in) != nil || in.Op != ocicrypt.OpKeyWrap && in.Op != ocicrypt.OpKeyUnwrap {
		return fmt.Errorf("%w: standard input has to be a request of ocicrypt's key provider protocol, with op %q or %q", ErrInput, ocicrypt.OpKeyWrap, ocicrypt.OpKeyUnwrap)
	}
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	call := p.UnwrapKey
	if in.Op == ocicrypt.OpKeyWrap {
		call = p.WrapKey
	}
	out, err := call(ctx, input)
	if err != nil {
		return err
	}
	defer clear(out)
	_, err = w.Write(out)
	return err
}

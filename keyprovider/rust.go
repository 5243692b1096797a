package keyprovider

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strconv"
	"strings"

	"github.com/containers/ocicrypt/config"
	ocicrypt "github.com/containers/ocicrypt/keywrap/keyprovider"
	"google.golang.org/grpc/metadata"
)

// The Rust dialect of the protocol is that of ocicrypt-rs, the library of Confidential
// Containers (ocicrypt-rs/src/keywrap/keyprovider/mod.rs of
// github.com/confidential-containers/guest-components). It differs in two ways: optsdata of a
// request to wrap is the JSON text itself, and not its base64, and bytes in answers are
// arrays of numbers.

// isTonic reports whether a request comes from tonic, the gRPC library of Rust. In the
// dialect, a request to unwrap is the same text as in ocicrypt's.
func isTonic(ctx context.Context) bool {
	agent := metadata.ValueFromIncomingContext(ctx, "user-agent")
	return len(agent) == 1 && strings.HasPrefix(agent[0], "tonic/")
}

// jsonText is a string in JSON that is a JSON object itself.
type jsonText []byte

var errNotText = errors.New("not the text of a JSON object")

// UnmarshalText copies b, and clears it.
func (t *jsonText) UnmarshalText(b []byte) error {
	if len(b) == 0 || b[0] != '{' || !json.Valid(b) {
		return errNotText
	}
	*t = slices.Clone(b)
	clear(b)
	return nil
}

// decodeRust decodes a request to wrap in the Rust dialect. It can't be taken for one of
// ocicrypt's: optsdata begins with a brace, which no base64 has.
func decodeRust(b []byte) (*ocicrypt.KeyProviderKeyWrapProtocolInput, bool) {
	var in struct {
		Operation     ocicrypt.KeyProviderKeyWrapProtocolOperation `json:"op"`
		KeyWrapParams struct {
			Ec       *config.EncryptConfig `json:"ec"`
			OptsData jsonText              `json:"optsdata"`
		} `json:"keywrapparams"`
	}
	if json.Unmarshal(b, &in) != nil || len(in.KeyWrapParams.OptsData) == 0 {
		clear(in.KeyWrapParams.OptsData)
		return nil, false
	}
	return &ocicrypt.KeyProviderKeyWrapProtocolInput{
		Operation:     in.Operation,
		KeyWrapParams: ocicrypt.KeyWrapParams{Ec: in.KeyWrapParams.Ec, OptsData: in.KeyWrapParams.OptsData},
	}, true
}

// numbersIn returns {outer: {inner: [1, 2, …]}} with those bytes, which may be a key: the
// caller clears it.
func numbersIn(outer, inner string, bytes []byte) []byte {
	b := make([]byte, 0, len(`{"":{"":[]}}`)+len(outer)+len(inner)+len("255,")*len(bytes))
	b = append(append(append(append(append(b, `{"`...), outer...), `":{"`...), inner...), `":[`...)
	for i, c := range bytes {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendUint(b, uint64(c), 10)
	}
	return append(b, `]}}`...)
}

package keyprovider

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"

	"github.com/containers/ocicrypt/config"
	ocicrypt "github.com/containers/ocicrypt/keywrap/keyprovider"

	"github.com/ctrlplane/pilot/processor/ocicryptclient"
)

// decodeInput decodes a request in the JSON of the protocol. It reports whether the request
// is one to wrap in the Rust dialect.
func decodeInput(b []byte, want ocicryptclient.Operation) (_ *ocicrypt.KeyProviderKeyWrapProtocolInput, isRust bool, err error) {
	if params, ok := decodeQuick(b); ok && want == ocicryptclient.Unwrap {
		return &ocicrypt.KeyProviderKeyWrapProtocolInput{Operation: ocicrypt.OpKeyUnwrap, KeyUnwrapParams: params}, false, nil
	}
	in := new(ocicrypt.KeyProviderKeyWrapProtocolInput)
	if json.Unmarshal(b, in) != nil {
		if in, isRust = decodeRust(b); !isRust {
			// The error of encoding/json may quote its input, which holds keys.
			return nil, false, fmt.Errorf("%w: it is not the JSON of ocicrypt's key provider protocol", ErrInput)
		}
	}
	if in.Operation != ocicrypt.KeyProviderKeyWrapProtocolOperation(want) {
		return nil, false, fmt.Errorf("%w: op is %.40q, not %q", ErrInput, in.Operation, want)
	}
	if want == ocicryptclient.Wrap && (in.KeyWrapParams.Ec == nil || len(in.KeyWrapParams.OptsData) == 0) {
		return nil, false, fmt.Errorf("%w: keywrapparams lack ec or optsdata", ErrInput)
	}
	return in, isRust, nil
}

// decodeQuick decodes a request to unwrap in the very bytes that ocicrypt writes, most of
// which are an annotation in base64. It reports false for others, which may be valid too:
// encoding/json, which decodes those, takes longer than unwrapping the key.
func decodeQuick(b []byte) (params ocicrypt.KeyUnwrapParams, ok bool) {
	b, isHead := bytes.CutPrefix(b, []byte(`{"op":"keyunwrap","keywrapparams":{"ec":null,"optsdata":null},"keyunwrapparams":{"dc":`))
	b, isTail := bytes.CutSuffix(b, []byte(`"}}`))
	begin := bytes.LastIndexByte(b, '"') + 1
	dc, isAnnotation := bytes.CutSuffix(b[:begin], []byte(`,"annotation":"`))
	text := b[begin:]
	// Decoders of base64 skip ends of lines, which a string in JSON has not.
	if !isHead || !isTail || !isAnnotation || bytes.ContainsAny(text, "\r\n") {
		return params, false
	}
	var err error
	if params.Annotation, err = base64.StdEncoding.AppendDecode(nil, text); err != nil {
		return params, false
	}
	if string(dc) == `{"Parameters":null}` { // without keys
		params.Dc = new(config.DecryptConfig)
		return params, true
	}
	return params, json.Unmarshal(dc, &params.Dc) == nil
}

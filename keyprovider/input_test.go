package keyprovider

import (
	"encoding/json"
	"reflect"
	"testing"

	"github.com/containers/ocicrypt/config"
	ocicrypt "github.com/containers/ocicrypt/keywrap/keyprovider"
)

// FuzzDecodeQuick compares decodeQuick with encoding/json, which decodes what decodeQuick
// does not.
func FuzzDecodeQuick(f *testing.F) {
	for _, dc := range []*config.DecryptConfig{nil, {}, {Parameters: map[string][][]byte{}}, {Parameters: map[string][][]byte{"pilot": {[]byte("a")}}}} {
		b, err := json.Marshal(ocicrypt.KeyProviderKeyWrapProtocolInput{
			Operation: ocicrypt.OpKeyUnwrap, KeyUnwrapParams: ocicrypt.KeyUnwrapParams{Dc: dc, Annotation: []byte("annotation")},
		})
		if err != nil {
			f.Fatal(err)
		}
		if _, ok := decodeQuick(b); !ok {
			f.Errorf("what ocicrypt writes is not read: %s", b)
		}
		f.Add(b)
	}
	const head = `{"op":"keyunwrap","keywrapparams":{"ec":null,"optsdata":null},"keyunwrapparams":{"dc":`
	for _, rest := range []string{
		`null,"annotation":"AA=="}}`, `null,"annotation":""}}`, `null,"annotation":"A\u0041=="}}`, "null,\"annotation\":\"AA=\n=\"}}", `null,"annotation":"AA"}}`,
		`null,"annotation":"AA==","annotation":"AAAA"}}`, `null},"x":{"y":null,"annotation":"AAAA"}}`, `{"Parameters":{"a":[null]}},"dc":null,"annotation":"AAAA"}}`,
		`"a,"annotation":"AAAA"}}`, ` null ,"annotation":"AAAA"}}`, `,"annotation":"AAAA"}}`, `null,"annotation":"AAAA"}}}`, `{"Parameters":{"pilot":["YQ=="]}},"annotation":"AAAA"}}`,
	} {
		f.Add([]byte(head + rest))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		params, ok := decodeQuick(b)
		if !ok {
			return
		}
		want := ocicrypt.KeyProviderKeyWrapProtocolInput{Operation: ocicrypt.OpKeyUnwrap}
		got := want
		got.KeyUnwrapParams = params
		err := json.Unmarshal(b, &want)
		if len(params.Annotation) == 0 && want.KeyUnwrapParams.Annotation != nil {
			got.KeyUnwrapParams.Annotation = []byte{}
		}
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q is read as %+v, and not as %+v, %v", b, got, want, err)
		}
	})
}

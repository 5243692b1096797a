package keyprovider

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	ocicrypt "github.com/containers/ocicrypt/keywrap/keyprovider"
	"google.golang.org/grpc"

	"github.com/ctrlplane/pilot/processor/ocicryptclient"
)

// rustOptsdata is what ocicrypt-rs wraps.
const rustOptsdata = `{"symkey":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=","digest":"sha256:18be","cipheroptions":{"nonce":"r10F9oaCu+nWFXfod3l83g=="}}`

// rustWrap returns a request to wrap as ocicrypt-rs writes it.
func rustWrap(t testing.TB, optsdata, kek string) []byte {
	t.Helper()
	text, err := json.Marshal(optsdata)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Appendf(nil, `{"op":"keywrap","keywrapparams":{"ec":{"Parameters":{"pilot":["%s"]},"DecryptConfig":null},"optsdata":%s},"keyunwrapparams":{"dc":null,"annotation":null}}`,
		base64.StdEncoding.EncodeToString([]byte(kek)), text)
}

// numbers returns the bytes in an answer of the Rust dialect, which has one member with one
// array of numbers.
func numbers(t testing.TB, answer []byte, outer, inner string) (b []byte) {
	t.Helper()
	var out map[string]map[string][]int
	if err := json.Unmarshal(answer, &out); err != nil || len(out) != 1 || len(out[outer]) != 1 {
		t.Fatalf("%s: %v", answer, err)
	}
	for _, n := range out[outer][inner] {
		b = append(b, byte(n))
	}
	return b
}

// TestRustClients speaks the dialect of ocicrypt-rs, which calls by tonic.
func TestRustClients(t *testing.T) {
	c := serveGRPC(t, startBroker(t, map[string][]byte{"team-a": nil}).url, time.Minute, grpc.WithUserAgent("tonic/0.14.2"))
	out, err := c.WrapKey(t.Context(), message(rustWrap(t, rustOptsdata, "team-a")))
	if err != nil {
		t.Fatal(err)
	}
	annotation := numbers(t, out.GetKeyProviderKeyWrapProtocolOutput(), "keywrapresults", "annotation")
	request := fmt.Appendf(nil, `{"op":"keyunwrap","keywrapparams":{"ec":null,"optsdata":null},"keyunwrapparams":{"dc":{"Parameters":{}},"annotation":"%s"}}`, base64.StdEncoding.EncodeToString(annotation))
	if out, err = c.UnWrapKey(t.Context(), message(request)); err != nil {
		t.Fatal(err)
	}
	answer := out.GetKeyProviderKeyWrapProtocolOutput()
	if got := numbers(t, answer, "keyunwrapresults", "optsdata"); string(got) != rustOptsdata {
		t.Errorf("it unwraps to %s", got)
	}
	// ocicrypt itself reads both dialects.
	if got := answerOf(t, answer).KeyUnwrapResults.OptsData; string(got) != rustOptsdata {
		t.Errorf("ocicrypt reads %s", got)
	}
	if _, err := c.WrapKey(t.Context(), message(rustWrap(t, rustOptsdata, "nobody"))); err == nil || !strings.Contains(err.Error(), "no such KEK") {
		t.Errorf("a KEK that does not exist: %v", err)
	}
}

// TestRequestToWrapShowsItsDialect: an executable learns nothing else of its caller.
func TestRequestToWrapShowsItsDialect(t *testing.T) {
	p := newProvider(t, startBroker(t, map[string][]byte{"team-a": nil}).url, Config{})
	s := Service{Provider: p}
	var out bytes.Buffer
	if err := s.Exec(t.Context(), bytes.NewReader(rustWrap(t, rustOptsdata, "team-a")), &out); err != nil {
		t.Fatal(err)
	}
	if got, err := p.UnwrapKey(t.Context(), nil, numbers(t, out.Bytes(), "keywrapresults", "annotation")); err != nil || string(got) != rustOptsdata {
		t.Errorf("%s, %v", got, err)
	}
	// A client by tonic that speaks ocicrypt's dialect to wrap is answered in that.
	answer, err := s.answer(t.Context(), ocicryptclient.Wrap, wrapRequest(t, "team-a"), true)
	if err != nil || !bytes.Contains(answer, []byte(`"annotation":"`)) {
		t.Errorf("%s, %v", answer, err)
	}
	for _, optsdata := range []string{"", "{", "{}x", "te{t", `"text"`, "[1]", " {}"} {
		if _, err := s.answer(t.Context(), ocicryptclient.Wrap, rustWrap(t, optsdata, "team-a"), true); !errors.Is(err, ErrInput) {
			t.Errorf("optsdata %q: %v", optsdata, err)
		}
	}
}

// FuzzDecodeRust checks that no request is valid in both dialects.
func FuzzDecodeRust(f *testing.F) {
	f.Add(rustWrap(f, rustOptsdata, "team-a"))
	f.Add(wrapRequest(f, "team-a"))
	f.Add([]byte(`{"op":"keywrap","keywrapparams":{"optsdata":"{}"},"keywrapparams":{"optsdata":"AAAA"}}`))
	f.Add([]byte(`{"op":"keywrap","KeyWrapParams":{"optsdata":null,"OptsData":"{\"a\":1}"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		in, ok := decodeRust(b)
		if !ok {
			return
		}
		if data := in.KeyWrapParams.OptsData; len(data) == 0 || data[0] != '{' || !json.Valid(data) {
			t.Errorf("%q: optsdata %q", b, data)
		}
		var ordinary ocicrypt.KeyProviderKeyWrapProtocolInput
		if json.Unmarshal(b, &ordinary) == nil {
			t.Errorf("%q is valid in both dialects", b)
		}
	})
}

package processor_test

import (
	"bytes"
	"testing"

	"github.com/ctrlplane/pilot/internal/protofield"
	"github.com/ctrlplane/pilot/processor"
)

// FuzzReadPayload has containerd pass anything.
func FuzzReadPayload(f *testing.F) {
	const secret = "SECRETSECRET"
	url, value := "io.containerd.ocicrypt.v1.Payload", `{"DecryptConfig":{"Parameters":{"privkeys":["`+secret+`"]}},"Descriptor":{"mediaType":"a","digest":"sha256:0","size":1}}`
	field := func(number byte, b string) []byte { return append([]byte{number<<3 | 2, byte(len(b))}, b...) }
	f.Add(append(field(1, url), field(2, value[:100])...))
	f.Add(append(field(1, url), field(2, `{"Descriptor":{"digest":"a"}}`)...))
	f.Add(append(field(1, "other"), field(2, `{}`)...))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := processor.ReadPayload(t.Context(), bytes.NewReader(b))
		if err == nil && p.Descriptor.Digest == "" {
			t.Error("a payload without a layer is accepted")
		}
		url, _ := protofield.Field(b, 1) // which is no key, and is quoted
		if err != nil && bytes.Contains([]byte(err.Error()), []byte(secret)) && !bytes.Contains(url, []byte(secret)) {
			t.Errorf("the error repeats keys: %v", err)
		}
	})
}

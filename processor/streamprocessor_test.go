package processor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/containerd/imgcrypt/v2"
	"github.com/containerd/typeurl/v2"
	"github.com/containers/ocicrypt/config"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// TestReadPayload reads what imgcrypt's own client code writes.
func TestReadPayload(t *testing.T) {
	in := imgcrypt.Payload{
		DecryptConfig: config.DecryptConfig{Parameters: map[string][][]byte{"privkeys": {[]byte("secret")}}},
		Descriptor: ocispec.Descriptor{
			Digest:      digest.FromString("layer"),
			Annotations: map[string]string{"a": "b"},
		},
	}
	a, err := typeurl.MarshalAnyToProto(&in)
	if err != nil {
		t.Fatal(err)
	}
	b, err := proto.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	p, err := ReadPayload(t.Context(), bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	got, _ := json.Marshal(p)
	want, _ := json.Marshal(in)
	if !bytes.Equal(got, want) {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestReadPayloadErrors(t *testing.T) {
	message := func(url, value string) string {
		b, err := proto.Marshal(&anypb.Any{TypeUrl: url, Value: []byte(value)})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	for _, test := range []struct{ name, in, want string }{
		{"empty", "", "no decryption payload"},
		{"garbage", "\xff\xff\xff garbage", "not a protobuf Any"},
		{"another type", message("types.example.com/other", "{}"), `is of type "types.example.com/other"`},
		{"not JSON", message(payloadType, `{"DecryptConfig": "SECRET`), "is not the JSON"},
		{"no layer", message(payloadType, "{}"), "names no layer"},
		{"huge", strings.Repeat("x", maxPayload+1), "more than 16777216 bytes"},
	} {
		_, err := ReadPayload(t.Context(), strings.NewReader(test.in))
		if err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%s: %v, want %q", test.name, err, test.want)
		}
	}

	r, w := io.Pipe()
	defer w.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := ReadPayload(ctx, r); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a payload that does not end: %v", err)
	}
}

func TestMediaTypes(t *testing.T) {
	for plain, encrypted := range map[string]string{
		"application/vnd.oci.image.layer.v1.tar":                       "application/vnd.oci.image.layer.v1.tar+encrypted",
		"application/vnd.oci.image.layer.v1.tar+gzip":                  "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
		"application/vnd.docker.image.rootfs.diff.tar.gzip":            "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
		"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":    "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
		"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": "application/vnd.oci.image.layer.v1.tar+zstd+encrypted",
		"application/vnd.wasm.content.layer.v1+wasm":                   "application/vnd.wasm.content.layer.v1+wasm+encrypted",
		"application/vnd.in-toto+json":                                 "application/vnd.in-toto+json+encrypted",
		"application/vnd.erofs.layer.v1+zstd":                          "application/vnd.erofs.layer.v1+zstd+encrypted",
		"Application/vnd.OCI.image.layer.v1.tar; a=b":                  "Application/vnd.OCI.image.layer.v1.tar; a=b+encrypted",
	} {
		got, ok := EncryptedMediaType(plain)
		if !ok || got != encrypted || !IsEncrypted(got) {
			t.Errorf("%s becomes %s, want %s", plain, got, encrypted)
		}
		back, ok := PlainMediaType(got)
		if want := strings.TrimSuffix(encrypted, "+encrypted"); !ok || back != want {
			t.Errorf("%s goes back to %s, want %s", got, back, want)
		}
		if _, ok := EncryptedMediaType(got); ok {
			t.Errorf("%s would be encrypted twice", got)
		}
	}
	for _, mt := range []string{"", "+encrypted", "text/plain+encrypted+encrypted"} {
		if got, ok := EncryptedMediaType(mt); ok || IsEncrypted(mt) {
			t.Errorf("%q would become %q", mt, got)
		}
	}
	if got, ok := PlainMediaType("application/vnd.oci.image.layer.nondistributable.v1.tar+zstd+encrypted"); !ok || got != "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd" {
		t.Errorf("nondistributable: %q", got)
	}
}

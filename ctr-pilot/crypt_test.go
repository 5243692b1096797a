package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/image/transport"
)

// TestReplacedImageThatStaysReadableIsNamed gives the names of plain and encrypted images to
// another one.
func TestReplacedImageThatStaysReadableIsNamed(t *testing.T) {
	s := httptest.NewServer(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0))))
	defer s.Close()
	dir := t.TempDir()
	repository := "docker://" + strings.TrimPrefix(s.URL, "http://") + "/app:"
	const plain, encrypted = ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayer + "+encrypted"
	withRegistry(t, func(ctx context.Context, p *places) {
		name := func(text string) transport.Name {
			n, err := transport.Parse(text)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		// write writes an image of one layer.
		write := func(to, layerType string) (manifest digest.Digest) {
			target, err := transport.OpenTarget(ctx, name(to), false, p.hosts)
			if err != nil {
				t.Fatal(err)
			}
			defer target.Close()
			put := func(mediaType string, b []byte) ocispec.Descriptor {
				desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
				if err := content.WriteBlob(ctx, target, desc.Digest.String(), bytes.NewReader(b), desc); err != nil {
					t.Fatal(err)
				}
				return desc
			}
			layer := put(layerType, []byte(to))
			layer.Annotations = map[string]string{"org.opencontainers.image.enc.keys.provider.pilot": "e30="}
			text, err := json.Marshal(ocispec.Manifest{
				Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{layer},
				Config: put(ocispec.MediaTypeImageConfig, []byte(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":["`+layer.Digest.String()+`"]}}`)),
			})
			if err != nil {
				t.Fatal(err)
			}
			desc := put(ocispec.MediaTypeImageManifest, text)
			if err := target.Name(ctx, target, desc, nil); err != nil {
				t.Fatal(err)
			}
			return desc.Digest
		}
		from := "oci:" + dir + "/from:1"
		write(from, plain)
		other := "oci:" + dir + "/other:1"
		write(other, plain)
		write("oci:"+dir+"/encrypted:1", encrypted)
		replaced := write(repository+"plain", plain)
		write(repository+"encrypted", encrypted)
		for _, test := range []struct{ from, to, want string }{
			{from, repository + "plain", "the previous image, as " + replaced.String() + ", until the registry deletes it"},
			{repository + "plain", repository + "plain", "the previous image, as " + replaced.String()},
			{from, repository + "encrypted", ""},
			{repository + "plain", repository + "encrypted", ""},
			{from, repository + "new", ""},
			{from, other, "the previous image, whose blobs are still in " + dir + "/other"},
			{from, "oci:" + dir + "/encrypted:1", ""},
			{from, "oci:" + dir + "/from:2", "whose blobs are still in " + dir + "/from"},
			{from, "oci:" + dir + "/new:1", ""},
		} {
			j, err := p.open(ctx, name(test.from), name(test.to), true)
			if err != nil {
				t.Errorf("%s to %s: %v", test.from, test.to, err)
				continue
			}
			if got := j.stillReadable(ctx); (got == "") != (test.want == "") || !strings.Contains(got, test.want) {
				t.Errorf("%s to %s: %q, want %q", test.from, test.to, got, test.want)
			}
			j.close()
		}
	})
}

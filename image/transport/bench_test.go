package transport

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/image"
)

// benchLayers and benchSize are those of the image that is encrypted: 256 MiB.
const (
	benchLayers = 4
	benchSize   = 64 << 20
)

// memoryDir returns a directory in memory, if there is one.
func memoryDir(b *testing.B) string {
	dir, err := os.MkdirTemp("/dev/shm", "pilot-bench-")
	if err != nil {
		return b.TempDir()
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// BenchmarkEncryptLayout encrypts from an OCI layout into another.
func BenchmarkEncryptLayout(b *testing.B) {
	ec, _ := newKey(b)
	dir := memoryDir(b)
	layers(b, dir+"/plain", benchLayers, benchSize)
	b.SetBytes(benchLayers * benchSize)
	for b.Loop() {
		to := target(b, "oci:"+dir+"/to:x", nil)
		if _, err := crypt(b, source(b, "oci:"+dir+"/plain:app", nil), to, func(ctx context.Context, cs image.Store, desc ocispec.Descriptor) (image.Result, error) {
			return image.Encrypt(ctx, cs, desc, ec, image.Options{})
		}); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		os.RemoveAll(dir + "/to")
		b.StartTimer()
	}
}

func layers(tb testing.TB, dir string, n, size int) {
	tb.Helper()
	to := target(tb, "oci:"+dir+":app", nil)
	text := ""
	diffs := ""
	for i := range n {
		b := make([]byte, size)
		rand.Read(b)
		desc := put(tb, to, ocispec.MediaTypeImageLayer, b)
		if i > 0 {
			text, diffs = text+",", diffs+","
		}
		text += fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, desc.MediaType, desc.Digest, desc.Size)
		diffs += fmt.Sprintf("%q", desc.Digest)
	}
	conf := put(tb, to, ocispec.MediaTypeImageConfig, []byte(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[`+diffs+`]}}`))
	manifest := put(tb, to, ocispec.MediaTypeImageManifest, fmt.Appendf(nil,
		`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[%s]}`,
		ocispec.MediaTypeImageManifest, conf.MediaType, conf.Digest, conf.Size, text))
	if err := to.Name(tb.Context(), to, manifest, nil); err != nil {
		tb.Fatal(err)
	}
}

package image

import (
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// benchImage is an image of four layers of 8 MiB in a content store on disk, and
// the image encrypted.
func benchImage(b *testing.B) (s *store, plain, encrypted ocispec.Descriptor) {
	b.Helper()
	s = newStore(b)
	conf := s.put(ocispec.MediaTypeImageConfig, `{"architecture":"amd64","os":"linux"}`)
	var layers []string
	for i := range 4 {
		layer := s.put(ocispec.MediaTypeImageLayer, strings.Repeat(fmt.Sprintf("layer %d ", i), 1<<20))
		layers = append(layers, `{"mediaType":"`+layer.MediaType+`",`+ref(layer)+`}`)
	}
	plain = s.put(ociManifest, `{"schemaVersion":2,"mediaType":"`+ociManifest+`","config":{"mediaType":"`+conf.MediaType+`",`+ref(conf)+`},"layers":[`+strings.Join(layers, ",")+`]}`)
	done, err := Encrypt(s.ctx, s, plain, s.ec, Options{})
	if err != nil {
		b.Fatal(err)
	}
	return s, plain, done.Target
}

func BenchmarkEncrypt(b *testing.B) {
	s, plain, _ := benchImage(b)
	b.SetBytes(4 << 23)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Encrypt(s.ctx, s, plain, s.ec, Options{}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDecrypt(b *testing.B) {
	s, _, encrypted := benchImage(b)
	b.SetBytes(4 << 23)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Decrypt(s.ctx, s, encrypted, s.dc, Options{}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkAddRecipient changes annotations and no layer.
func BenchmarkAddRecipient(b *testing.B) {
	s, _, encrypted := benchImage(b)
	s.ec.Keys = s.dc
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Encrypt(s.ctx, s, encrypted, s.ec, Options{}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkVerifyTOC verifies the table of contents of a layer with 20,000 files.
func BenchmarkVerifyTOC(b *testing.B) {
	var text strings.Builder
	text.WriteString(`{"version":1,"entries":[`)
	for i := range 20_000 {
		d := digest.FromString(fmt.Sprint(i))
		if i > 0 {
			text.WriteString(",")
		}
		fmt.Fprintf(&text, `{"name":"usr/share/doc/package-%d/file-%d","type":"reg","size":1234,"modtime":"2026-01-02T03:04:05Z","mode":420,"NumLink":1,"digest":"%s","offset":%d,"chunkDigest":"%[3]s"}`, i%100, i, d, i*1000)
	}
	text.WriteString("]}")
	end := gzipped(tarOf(b, reg(estargz.TOCTarName, text.String())))
	end += string(estargz.CreateGzipFooter(fmt.Appendf([]byte("SG\x16\x00"), "%016xSTARGZ", 0)))
	l := Lazy{Size: int64(len(end)), TOC: digest.FromString(text.String())}
	b.SetBytes(int64(text.Len()))
	for b.Loop() {
		if err := VerifyTOC(l, []byte(end)); err != nil {
			b.Fatal(err)
		}
	}
}

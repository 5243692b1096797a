package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// overlay is a store with what was converted.
type overlay struct {
	*store
	*Converted
}

func (o overlay) Info(ctx context.Context, d digest.Digest) (content.Info, error) {
	if o.Has(d) {
		return o.Converted.Info(ctx, d)
	}
	return o.store.Info(ctx, d)
}

func (o overlay) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if o.Has(desc.Digest) {
		return o.Converted.ReaderAt(ctx, desc)
	}
	return o.store.ReaderAt(ctx, desc)
}

func (o overlay) ReadRange(ctx context.Context, desc ocispec.Descriptor, p []byte, off int64) error {
	ra, err := o.ReaderAt(ctx, desc)
	if o.Has(desc.Digest) {
		return o.Converted.ReadRange(ctx, desc, p, off)
	}
	if err == nil {
		_, err = ra.ReadAt(p, off)
	}
	return err
}

// mustConvert converts an image of s.
func (s *store) mustConvert(target ocispec.Descriptor, opts Options) overlay {
	s.t.Helper()
	before := s.blobs()
	c, err := Convert(s.ctx, s, target, opts)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = c.Close() })
	if n := s.blobs() - before; n != 0 {
		s.t.Errorf("%d blobs were written", n)
	}
	return overlay{s, c}
}

func (o overlay) read(desc ocispec.Descriptor) string {
	o.t.Helper()
	b, err := content.ReadBlob(o.ctx, o, desc)
	if err != nil {
		o.t.Fatal(err)
	}
	return string(b)
}

func gzipped(text string) string {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, _ = io.WriteString(w, text)
	_ = w.Close()
	return b.String()
}

func zstded(text string) string {
	var b bytes.Buffer
	w, _ := zstd.NewWriter(&b)
	_, _ = io.WriteString(w, text)
	_ = w.Close()
	return b.String()
}

// filesOf lists the files of a tar archive, the last of each name, in the order of names.
func filesOf(t testing.TB, r io.Reader) []file {
	t.Helper()
	files := map[string]file{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		h.Format, h.PAXRecords = 0, maps.Clone(h.PAXRecords)
		maps.DeleteFunc(h.PAXRecords, func(name, _ string) bool { return !strings.HasPrefix(name, "SCHILY.xattr.") })
		files[cleanName(h.Name)] = file{*h, string(text)}
	}
	for _, name := range []string{estargz.NoPrefetchLandmark, estargz.TOCTarName} {
		delete(files, name)
	}
	var list []file
	for _, name := range slices.Sorted(maps.Keys(files)) {
		list = append(list, files[name])
	}
	return list
}

func sameTar(t testing.TB, what, got, want string) {
	t.Helper()
	z, err := gzip.NewReader(strings.NewReader(got))
	if err != nil {
		t.Fatal(err)
	}
	a, err := json.Marshal(filesOf(t, z))
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(filesOf(t, strings.NewReader(want)))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Errorf("%s: the files are %.2000s\nand were %.2000s", what, a, b)
	}
}

// TestConvertedImageIsLazyOnceEncrypted converts an index with all that it can have.
func TestConvertedImageIsLazyOnceEncrypted(t *testing.T) {
	newKEKs(t, "a")
	s := newStore(t)
	t.Setenv("TMPDIR", t.TempDir())
	shared, second, third := allKinds(t), tarOf(t, reg("second", "2")), tarOf(t, reg("third", "3"))
	already := build(t, tarOf(t, reg("already", "4")))
	empty := tarOf(t)
	foreign := ocispec.Descriptor{MediaType: dockerForeign, Digest: digest.FromString("elsewhere"), Size: 9, URLs: []string{"https://example.com/layer"}}
	marked := s.put(already.mediaType, already.blob)
	marked.Annotations = map[string]string{tocAnnotation: already.toc.String(), "other": "annotation"}
	id := func(text string) string { return digest.FromString(text).String() }
	config := s.put(ocispec.MediaTypeImageConfig, `{ "os":"linux","architecture":"amd64", "unknown": 1.50,
		"rootfs":{"type":"layers", "diff_ids" : [ "`+id(shared)+`","`+id(second)+`", "`+id(third)+`",
		"`+already.diffID.String()+`","`+id(empty)+`" ,"`+id("x")+`"]},"history":[{"created_by":"x","empty_layer":true},{},{},{},{},{},{}]}`)
	list := []ocispec.Descriptor{
		s.put(ocispec.MediaTypeImageLayerGzip, gzipped(shared)), s.put(ocispec.MediaTypeImageLayerZstd, zstded(second)), s.put(ocispec.MediaTypeImageLayer, third),
		marked, s.put(ocispec.MediaTypeImageLayerGzip, gzipped(empty)), foreign,
	}
	list[1].Annotations = map[string]string{"keep": "me"}
	doc, err := json.Marshal(ocispec.Manifest{MediaType: ociManifest, Config: config, Layers: list})
	if err != nil {
		t.Fatal(err)
	}
	first := s.put(ociManifest, string(doc))
	dockerConf := s.put(dockerConfig, `{"os":"linux","architecture":"arm64","rootfs":{"type":"layers","diff_ids":["`+id(shared)+`"]}}`)
	docker := s.put(dockerManifest, `{"schemaVersion":2,"mediaType":"`+dockerManifest+`","config":{"mediaType":"`+dockerConfig+`",`+ref(dockerConf)+`},
		"layers":[{"mediaType":"`+dockerGzip+`",`+ref(list[0])+`}]}`)
	statement := s.put("application/vnd.in-toto+json", `{"subject":"x"}`)
	attestation := s.of(ocispec.MediaTypeImageConfig, `{"rootfs":{"diff_ids":["`+statement.Digest.String()+`"]}}`, []ocispec.Descriptor{statement})
	index := s.put(ociIndex, `{"schemaVersion":2,"manifests":[{"mediaType":"`+ociManifest+`",`+ref(first)+`,"platform":{"os":"linux","architecture":"amd64"}},
		{"mediaType":"`+dockerManifest+`",`+ref(docker)+`,"platform":{"os":"linux","architecture":"arm64"}},
		{"mediaType":"`+ociManifest+`",`+ref(attestation)+`,"annotations":{"`+attestationAnnotation+`":"`+first.Digest.String()+`","`+attestationTypeAnnotation+`":"attestation-manifest"}}]}`)

	o := s.mustConvert(index, Options{})
	if o.Layers != 5 || o.Target.Digest == index.Digest {
		t.Fatalf("%d layers were converted, into %s", o.Layers, o.Target.Digest)
	}
	if left, err := os.ReadDir(os.Getenv("TMPDIR")); err != nil || len(left) > 0 {
		t.Errorf("temporary files with names: %v, %v", left, err)
	}
	var converted ocispec.Index
	if err := json.Unmarshal([]byte(o.read(o.Target)), &converted); err != nil {
		t.Fatal(err)
	}
	if got := converted.Manifests[2].Annotations[attestationAnnotation]; got != converted.Manifests[0].Digest.String() || converted.Manifests[2].Digest != attestation.Digest {
		t.Errorf("the attestation is %+v", converted.Manifests[2])
	}
	for i, want := range [][]string{{shared, second, third, "", empty, ""}, {shared}} {
		var m ocispec.Manifest
		if err := json.Unmarshal([]byte(o.read(converted.Manifests[i])), &m); err != nil {
			t.Fatal(err)
		}
		var c struct {
			RootFS  ocispec.RootFS
			History []any
			Unknown json.Number
		}
		text := o.read(m.Config)
		if err := json.Unmarshal([]byte(text), &c); err != nil {
			t.Fatal(err)
		}
		if m.MediaType != ociManifest || m.Config.MediaType != ocispec.MediaTypeImageConfig || i == 0 && (len(c.History) != 7 || !strings.Contains(text, `"unknown": 1.50`)) {
			t.Errorf("manifest %d: %+v, configuration %s", i, m, text)
		}
		for j, archive := range want {
			l := m.Layers[j]
			if archive == "" {
				if l.Digest != list[j].Digest || l.MediaType == list[j].MediaType != (j != 5) || !maps.Equal(l.Annotations, list[j].Annotations) || !slices.Equal(l.URLs, list[j].URLs) {
					t.Errorf("layer %d was %+v and is %+v", j, list[j], l)
				}
				continue
			}
			blob := o.read(l)
			r, err := estargz.Open(io.NewSectionReader(strings.NewReader(blob), 0, l.Size))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := r.VerifyTOC(digest.Digest(l.Annotations[tocAnnotation])); err != nil || l.MediaType != ocispec.MediaTypeImageLayerGzip {
				t.Errorf("layer %d: %+v: %v", j, l, err)
			}
			if _, ok := r.Lookup(estargz.NoPrefetchLandmark); !ok {
				t.Errorf("layer %d would be prefetched", j)
			}
			sameTar(t, "layer", blob, archive)
			z, err := gzip.NewReader(strings.NewReader(blob))
			if err != nil {
				t.Fatal(err)
			}
			got, err := digest.FromReader(z)
			if err != nil || got != c.RootFS.DiffIDs[j] {
				t.Errorf("layer %d has the diff ID %s, and the configuration %s", j, got, c.RootFS.DiffIDs[j])
			}
		}
		if i == 0 && (m.Layers[1].Annotations["keep"] != "me" || c.RootFS.DiffIDs[3] != already.diffID || c.RootFS.DiffIDs[5].String() != id("x")) {
			t.Errorf("%+v, %+v", m.Layers[1], c)
		}
	}

	to := kek("pilot", "a")
	if err := Check(s.ctx, s, index, to, Options{AllowPlain: true}); err != nil {
		t.Error(err)
	}
	if err := Check(s.ctx, s, index, to, Options{}); !errors.As(err, new(*PlainError)) {
		t.Errorf("a foreign layer stays readable: %v", err)
	}
	if err := Check(s.ctx, s, index, kek("pilot", "nobody"), Options{AllowPlain: true}); err == nil || !strings.Contains(err.Error(), "no such KEK") {
		t.Errorf("without the KEK: %v", err)
	}
	result, err := Encrypt(s.ctx, o, o.Target, to, Options{AllowPlain: true})
	if err != nil || result.Lazy != 5 || len(result.NotLazy) > 0 {
		t.Fatalf("%+v, %v", result, err)
	}
	out, err := Decrypt(s.ctx, o, result.Target, s.dc, Options{})
	if err != nil || out.Target.Digest != o.Target.Digest {
		t.Errorf("it came back as %s, and was %s: %v", out.Target.Digest, o.Target.Digest, err)
	}
	// One that is converted already stays.
	if again := s.mustConvert(out.Target, Options{}); again.Layers != 0 || again.Target.Digest != out.Target.Digest {
		t.Errorf("%d layers were converted again", again.Layers)
	}
	// Only what is to be encrypted is converted.
	for _, opts := range []Options{{Layers: []int{1}}, {Platforms: []ocispec.Platform{{OS: "linux", Architecture: "arm64"}}}, {Base: []ocispec.Descriptor{list[0], list[1], list[2]}}} {
		if some := s.mustConvert(index, opts); some.Layers != 1 {
			t.Errorf("%+v: %d layers were converted", opts, some.Layers)
		}
	}
}

// shortReads is a store that reads a few bytes at a time.
type shortReads struct{ *store }

func (s shortReads) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	ra, err := s.store.ReaderAt(ctx, desc)
	return shortReader{ra, rand.New(rand.NewPCG(1, uint64(desc.Size)))}, err
}

type shortReader struct {
	content.ReaderAt
	rng *rand.Rand
}

func (r shortReader) ReadAt(p []byte, off int64) (int, error) {
	return r.ReaderAt.ReadAt(p[:min(len(p), 1+r.rng.IntN(70000))], off)
}

// TestSameLayersAreConvertedToTheSameBytes encrypts a rebuilt image like the one before.
func TestSameLayersAreConvertedToTheSameBytes(t *testing.T) {
	newKEKs(t, "a")
	s := newStore(t)
	archive := allKinds(t)
	image := func(last string) ocispec.Descriptor {
		config := s.config(archive, last)
		return s.of(ocispec.MediaTypeImageConfig, config, []ocispec.Descriptor{s.put(ocispec.MediaTypeImageLayerGzip, gzipped(archive)), s.put(ocispec.MediaTypeImageLayer, last)})
	}
	v1, v2 := image(tarOf(t, reg("v", "1"))), image(tarOf(t, reg("v", "2")))
	o1 := s.mustConvert(v1, Options{})
	short, err := Convert(s.ctx, shortReads{s}, v1, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer short.Close()
	if short.Target.Digest != o1.Target.Digest {
		t.Error("with short reads, other bytes come out")
	}
	to := kek("pilot", "a")
	to.Keys = s.dc
	was, err := Encrypt(s.ctx, o1, o1.Target, to, Options{})
	if err != nil {
		t.Fatal(err)
	}
	o2 := s.mustConvert(v2, Options{})
	is, err := Encrypt(s.ctx, o2, o2.Target, to, Options{Like: s.like(was.Target)})
	if err != nil || is.Reused.Layers != 1 || is.Lazy != 2 {
		t.Errorf("%+v, %v", is, err)
	}
}

// config returns a configuration with the diff IDs of these archives.
func (s *store) config(archives ...string) string {
	var c ocispec.Image
	for _, a := range archives {
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, digest.FromString(a))
	}
	b, err := json.Marshal(c)
	if err != nil {
		s.t.Fatal(err)
	}
	return string(b)
}

// TestBrokenEstargzIsConvertedAnew converts layers that say that they can be pulled lazily,
// and could not be sealed.
func TestBrokenEstargzIsConvertedAnew(t *testing.T) {
	newKEKs(t, "a")
	s := newStore(t)
	archive := tarOf(t, reg("a", "content"))
	good, twice := build(t, archive), buildLossless(t, tarOf(t, reg("a", "1"), reg("a", "2")))
	falseTOC, noFooter := good, good
	falseTOC.toc = digest.FromString("x")
	noFooter.blob, noFooter.diffID = gzipped(archive), digest.FromString(archive)
	o := s.mustConvert(s.lazyImage(good, twice, falseTOC, noFooter), Options{})
	result, err := Encrypt(s.ctx, o, o.Target, kek("pilot", "a"), Options{})
	if err != nil || o.Layers != 3 || result.Layers != 3 || len(result.NotLazy) > 0 {
		t.Errorf("%d layers were converted, %+v, %v", o.Layers, result, err)
	}
}

// TestDamagedImagesAreNotConverted has images that nodes would not unpack.
func TestDamagedImagesAreNotConverted(t *testing.T) {
	s := newStore(t)
	archive := tarOf(t, reg("a", strings.Repeat("content", 1000)))
	z := gzipped(archive)
	image := func(config, mediaType, blob string) ocispec.Descriptor {
		return s.of(ocispec.MediaTypeImageConfig, config, []ocispec.Descriptor{s.put(mediaType, blob)})
	}
	const gz = ocispec.MediaTypeImageLayerGzip
	contiguous := file{tar.Header{Typeflag: tar.TypeCont, Name: "contiguous"}, ""}
	for name, test := range map[string]struct {
		target ocispec.Descriptor
		want   string
	}{
		"another diff ID":     {image(s.config("x"), gz, z), "the image is damaged"},
		"cut":                 {image(s.config(archive), gz, z[:len(z)-9]), "unexpected EOF"},
		"changed":             {image(s.config(archive), gz, z[:len(z)-8]+"12345678"), "checksum"},
		"something after it":  {image(s.config(archive), gz, z+strings.Repeat("x", 20)), "gzip"},
		"no tar archive":      {image(s.config("x"), gz, gzipped(strings.Repeat("x", 5000))), "tar"},
		"a strange file":      {image(s.config(tarOf(t, contiguous)), gz, gzipped(tarOf(t, contiguous))), "unsupported input tar entry"},
		"keys twice":          {image(`{"rootfs":{"diff_ids":["`+digest.FromString(archive).String()+`"]},"rootfs":{"diff_ids":["`+digest.FromString(archive).String()+`"]}}`, gz, z), "duplicate key"},
		"keys in two ways":    {image(`{"rootFS":{},"rootfs":{"diff_ids":["`+digest.FromString(archive).String()+`"]}}`, gz, z), "can be taken for"},
		"diff IDs in two way": {image(`{"rootfs":{"Diff_ids":[],"diff_ids":["`+digest.FromString(archive).String()+`"]}}`, gz, z), "can be taken for"},
	} {
		c, err := Convert(s.ctx, s, test.target, Options{})
		if err == nil {
			_ = c.Close()
		}
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
	}
	// What nobody unpacks stays as it is.
	layer := s.put(gz, "no layer")
	for name, target := range map[string]ocispec.Descriptor{
		"an artifact": s.artifact(layer), "one without diff IDs": s.of(ocispec.MediaTypeImageConfig, "{}", []ocispec.Descriptor{layer}),
		"another type": s.image(s.put("application/vnd.example", "x")),
	} {
		if o := s.mustConvert(target, Options{}); o.Layers != 0 || o.Target.Digest != target.Digest {
			t.Errorf("%s was converted", name)
		}
	}
	t.Setenv("TMPDIR", filepath.Join(t.TempDir(), "none"))
	if _, err := Convert(s.ctx, s, image(s.config(archive), gz, z), Options{}); err == nil || !strings.Contains(err.Error(), os.Getenv("TMPDIR")) {
		t.Errorf("without a directory for temporary files: %v", err)
	}
	ctx, cancel := context.WithCancel(s.ctx)
	cancel()
	if _, err := Convert(ctx, s, image(s.config(archive), gz, z), Options{}); err == nil {
		t.Error("it was converted after it was cancelled")
	}
}

package image

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestOddArchivesAreConvertedAsTheyAreUnpacked has archives that tools rarely make.
func TestOddArchivesAreConvertedAsTheyAreUnpacked(t *testing.T) {
	newKEKs(t, "a")
	s := newStore(t)
	global := file{tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": "x"}}, ""}
	dir := func(mode int64) file { return file{tar.Header{Typeflag: tar.TypeDir, Name: "d/", Mode: mode}, ""} }
	twice := tarOf(t, reg("a", "first"), dir(0o700), reg("d/b", "1"), reg("./a", strings.Repeat("second", 1<<20)), dir(0o755), reg("a", "third"), reg("d/b", "2"))
	for name, archive := range map[string]string{
		"a file twice":       twice,
		"global headers":     tarOf(t, reg("a", "1")),
		"landmarks":          tarOf(t, reg(estargz.PrefetchLandmark, "\x0f"), reg("a", "1"), reg(estargz.NoPrefetchLandmark, "\x0f")),
		"padding":            tarOf(t, reg("a", "1")) + strings.Repeat("\x00", 10240),
		"no end":             strings.TrimRight(tarOf(t, reg("a", strings.Repeat("1", 512))), "\x00"),
		"something after it": tarOf(t, reg("a", "1")) + "trailer",
		"nothing at all":     "",
	} {
		if name == "global headers" {
			archive = tarOf(t, global, reg("a", "1"), global)
		}
		o := s.mustConvert(s.of(ocispec.MediaTypeImageConfig, s.config(archive), []ocispec.Descriptor{s.put(ocispec.MediaTypeImageLayerGzip, gzipped(archive))}), Options{})
		result, err := Encrypt(s.ctx, o, o.Target, kek("pilot", "a"), Options{})
		if err != nil || o.Layers != 1 || result.Lazy != 1 || len(result.NotLazy) > 0 {
			t.Errorf("%s: %d layers converted, %+v, %v", name, o.Layers, result, err)
			continue
		}
		var m ocispec.Manifest
		if err := json.Unmarshal([]byte(o.read(o.Target)), &m); err != nil {
			t.Fatal(err)
		}
		plain := tarOf(t, slices.DeleteFunc(filesOf(t, strings.NewReader(archive)), func(f file) bool {
			return f.Typeflag == tar.TypeXGlobalHeader || f.Name == estargz.PrefetchLandmark
		})...)
		sameTar(t, name, o.read(m.Layers[0]), plain)
	}
}

// TestTableOfContentsIsBoundedWhileItIsMade has layers whose tables of contents would fill
// the memory.
func TestTableOfContentsIsBoundedWhileItIsMade(t *testing.T) {
	const limit = 10_000
	var many []file
	for i := range limit / 100 {
		many = append(many, reg(strings.Repeat("x", i), ""))
	}
	xattr := reg("a", "")
	xattr.PAXRecords = map[string]string{"SCHILY.xattr.user.x": strings.Repeat("x", limit)}
	for name, files := range map[string][]file{
		"many files": many, "a long name": {reg(strings.Repeat("long/", limit)+"x", "")},
		"a long link":      {{tar.Header{Typeflag: tar.TypeSymlink, Name: "a", Linkname: strings.Repeat("x", limit)}, ""}},
		"a long attribute": {xattr, reg("b", "")}, "many chunks": {reg("a", strings.Repeat("\x00", 34*chunkSize))},
	} {
		_, err := copyFiles(tar.NewWriter(io.Discard), tar.NewReader(strings.NewReader(tarOf(t, files...))), nil, limit)
		if !errors.Is(err, ErrLimit) || !strings.Contains(err.Error(), "split the layer") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := copyFiles(tar.NewWriter(io.Discard), tar.NewReader(strings.NewReader(tarOf(t, many[:10]...))), nil, limit); err != nil {
		t.Error(err)
	}
}

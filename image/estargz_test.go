package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
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
	d := func(mode int64) file { return file{tar.Header{Typeflag: tar.TypeDir, Name: "d/", Mode: mode}, ""} }
	twice := tarOf(t, reg("a", "first"), d(0o700), reg("d/b", "1"), reg("./a", strings.Repeat("second", 1<<20)), d(0o755), reg("a", "third"), reg("d/b", "2"))
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
		plain := tarOf(t, slices.DeleteFunc(filesOf(t, strings.NewReader(archive)), func(f file) bool {
			return f.Typeflag == tar.TypeXGlobalHeader || f.Name == estargz.PrefetchLandmark
		})...)
		sameTar(t, name, o.read(layersOf(t, o.read(o.Target))[0]), plain)
	}
}

// TestFilesWithASlashAtTheEndAreConverted has a regular file that Go's library would not
// write, and which is unpacked without the slash.
func TestFilesWithASlashAtTheEndAreConverted(t *testing.T) {
	newKEKs(t, "a")
	s := newStore(t)
	header := []byte(tarOf(t, reg("ab", "1")))
	header[1] = '/'
	copy(header[148:156], "        ")
	sum := 0
	for _, b := range header[:512] {
		sum += int(b)
	}
	copy(header[148:156], fmt.Sprintf("%06o\x00 ", sum))
	if f := filesOf(t, bytes.NewReader(header)); len(f) != 1 || f[0].Name != "a/" || f[0].Typeflag != tar.TypeReg {
		t.Fatalf("the archive has %+v", f)
	}
	o := s.mustConvert(s.of(ocispec.MediaTypeImageConfig, s.config(string(header)), []ocispec.Descriptor{s.put(ocispec.MediaTypeImageLayerGzip, gzipped(string(header)))}), Options{})
	result, err := Encrypt(s.ctx, o, o.Target, kek("pilot", "a"), Options{})
	if err != nil || result.Lazy != 1 {
		t.Errorf("%+v, %v", result, err)
	}
	sameTar(t, "a slash", o.read(layersOf(t, o.read(o.Target))[0]), tarOf(t, reg("a", "1")))
}

func layersOf(t *testing.T, manifest string) []ocispec.Descriptor {
	t.Helper()
	var m ocispec.Manifest
	if err := json.Unmarshal([]byte(manifest), &m); err != nil {
		t.Fatal(err)
	}
	return m.Layers
}

// TestDuplicatesThatMatterStay has files that are replaced once something else depends on
// them, so that leaving them out would give the image other files.
func TestDuplicatesThatMatterStay(t *testing.T) {
	newKEKs(t, "a")
	s := newStore(t)
	for name, files := range map[string][]file{
		"a hard link to the first":     {reg("a", "1"), hardLink("b", "a"), reg("a", "2")},
		"a directory that was emptied": {dir("d"), reg("d/a", "1"), reg("d", "2"), dir("d")},
	} {
		archive := tarOf(t, files...)
		o := s.mustConvert(s.of(ocispec.MediaTypeImageConfig, s.config(archive), []ocispec.Descriptor{s.put(ocispec.MediaTypeImageLayer, archive)}), Options{})
		z, err := gzip.NewReader(strings.NewReader(o.read(layersOf(t, o.read(o.Target))[0])))
		if err != nil {
			t.Fatal(err)
		}
		tr := tar.NewReader(z)
		if _, err := tr.Next(); err != nil { // the landmark
			t.Fatal(err)
		}
		for _, f := range files {
			h, err := tr.Next()
			if err != nil {
				t.Fatal(err)
			}
			text, err := io.ReadAll(tr)
			if err != nil || h.Name != f.Name || h.Typeflag != f.Typeflag || string(text) != f.content {
				t.Errorf("%s: %s %q, %v, want %s %q", name, h.Name, text, err, f.Name, f.content)
			}
		}
		result, err := Encrypt(s.ctx, o, o.Target, kek("pilot", "a"), Options{})
		if err != nil || result.Lazy != 0 || len(result.NotLazy) != 1 || !strings.Contains(result.NotLazy[0].Reason, "twice") {
			t.Errorf("%s: %+v, %v", name, result, err)
		}
	}
}

// TestSparseFilesAreConverted has a file whose holes are not read, which can't keep a
// conversion from being interrupted.
func TestSparseFilesAreConverted(t *testing.T) {
	var b bytes.Buffer
	archive := sparse(t, "a")
	if _, err := copyFiles(t.Context(), tar.NewWriter(&b), tar.NewReader(strings.NewReader(archive)), nil, maxTOC); err != nil {
		t.Fatal(err)
	}
	files := filesOf(t, &b)
	if want := "x" + strings.Repeat("\x00", 1<<20-1); len(files) != 1 || files[0].content != want {
		t.Errorf("%d files", len(files))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := copyFiles(ctx, tar.NewWriter(io.Discard), tar.NewReader(strings.NewReader(archive)), nil, maxTOC); !errors.Is(err, context.Canceled) {
		t.Errorf("it was not interrupted: %v", err)
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
		"chunks with a long name": {reg(strings.Repeat("x", limit/8), strings.Repeat("\x00", 8*chunkSize))},
		"escaped characters":      {reg(strings.Repeat("\x01", limit/4), "")},
	} {
		_, err := copyFiles(t.Context(), tar.NewWriter(io.Discard), tar.NewReader(strings.NewReader(tarOf(t, files...))), nil, limit)
		if !errors.Is(err, ErrLimit) || !strings.Contains(err.Error(), "split the layer") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := copyFiles(t.Context(), tar.NewWriter(io.Discard), tar.NewReader(strings.NewReader(tarOf(t, many[:10]...))), nil, limit); err != nil {
		t.Error(err)
	}
}

package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// sealed returns what is sealed of a layer of an encrypted image.
func (s *store) sealed(l ocispec.Descriptor) (Lazy, error) {
	s.t.Helper()
	key, err := processor.Unwrap(s.ctx, s.dc, l)
	if err != nil {
		s.t.Fatal(err)
	}
	defer key.Clear()
	sealed, err := SealedLazy(key, l)
	if err == nil && !sealed.IsWrapped(key) {
		err = errors.New("what is sealed is not wrapped with the key")
	}
	return sealed, err
}

// TestChunkedLayersAreSealed encrypts layers of each tool that makes them.
func TestChunkedLayersAreSealed(t *testing.T) {
	newKEKs(t, "a", "b")
	s := newStore(t)
	archive := allKinds(t)
	layers := map[string]chunked{
		"Build": build(t, archive), "Build with little chunks": build(t, archive, estargz.WithChunkSize(300007)),
		"Build with several files in a chunk": build(t, archive, estargz.WithMinChunkSize(1<<20)),
		"lossless":                            buildLossless(t, archive), "zstd:chunked": buildZstd(t, archive),
		"no files": build(t, tarOf(t)), "lossless, no files": buildLossless(t, tarOf(t)),
	}
	names := slices.Sorted(maps.Keys(layers))
	var list []chunked
	for _, name := range names {
		list = append(list, layers[name])
	}
	plain := s.lazyImage(list...)
	result := s.mustEncrypt(plain, kek("pilot", "a"), Options{})
	if result.Lazy != len(list) || len(result.NotLazy) > 0 {
		t.Errorf("%d layers are sealed, and these are not: %+v", result.Lazy, result.NotLazy)
	}
	check := func(what string, target ocispec.Descriptor) {
		t.Helper()
		for i, l := range s.layers(target) {
			want := list[i]
			got, err := s.sealed(l)
			if err != nil || !IsLazy(l) {
				t.Errorf("%s: %s: %v", what, names[i], err)
				continue
			}
			tail := want.blob[got.TailOffset:]
			if got.Plain != digest.FromString(want.blob) || got.Size != int64(len(want.blob)) || got.DiffID != want.diffID || got.TOC != want.toc || got.Tail != digest.FromString(tail) {
				t.Errorf("%s: %s: %+v", what, names[i], got)
			}
			// The tail alone is enough for the library to find the table of contents.
			blob := strings.Repeat("\x00", int(got.TailOffset)) + tail
			r, err := estargz.Open(io.NewSectionReader(strings.NewReader(blob), 0, int64(len(blob))), estargz.WithDecompressors(new(zstdchunked.Decompressor)))
			if err != nil || r.TOCDigest() != want.toc {
				t.Errorf("%s: %s: the library: %v", what, names[i], err)
			}
		}
	}
	check("encrypted", result.Target)
	s.mustComeBack(result, plain)

	// The seal is kept by all that changes recipients, also by older images' rules.
	more := s.mustEncrypt(result.Target, kek("pilot", "b"), Options{})
	check("with more recipients", more.Target)
	rewrapped, err := Rewrap(s.ctx, s, more.Target, Rewrapping{Keys: s.dc, From: "a", To: "b"}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	check("rewrapped", rewrapped.Target)
	built := s.layers(rewrapped.Target)
	for i := range built {
		toc := built[i].Annotations[tocAnnotation]
		built[i].Annotations = map[string]string{tocAnnotation: toc} // BuildKit keeps those of eStargz
	}
	again := s.mustEncrypt(s.of(ocispec.MediaTypeImageConfig, `{}`, built), kek("pilot", "b"), Options{KeysFrom: s.layers(rewrapped.Target)})
	check("built on", again.Target)
	s.mustComeBack(Result{Target: rewrapped.Target}, plain)
	s.noIngests()
}

// TestLayersWithoutSealSayWhy encrypts layers that say that they can be pulled lazily.
func TestLayersWithoutSealSayWhy(t *testing.T) {
	newKEKs(t, "a")
	s := newStore(t)
	archive := tarOf(t, reg("a", "content of a"), reg("b", "content of b"), file{tar.Header{Typeflag: tar.TypeSymlink, Name: "link", Linkname: "a"}, ""},
		file{tar.Header{Typeflag: tar.TypeReg, Name: "x", PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "1"}}, "executable"})
	good, zstd := build(t, archive), buildZstd(t, archive)
	with := func(c chunked, change func(*chunked)) chunked {
		change(&c)
		return c
	}
	entry := func(name string, change func(e *estargz.TOCEntry)) func(*estargz.JTOC) {
		return func(toc *estargz.JTOC) {
			for _, e := range toc.Entries {
				if e.Name == name {
					change(e)
					return
				}
			}
			t.Fatalf("no %s", name)
		}
	}
	x := digest.FromString("x")
	footer := func(offset string) func(*chunked) {
		return func(c *chunked) {
			n := len(c.blob) - estargz.FooterSize
			c.blob = c.blob[:n] + strings.Replace(c.blob[n:], c.blob[n+16:n+32], offset, 1)
		}
	}
	tocOf := func(archive, text string) chunked { // with another text as its table of contents
		inTar := tarOf(t, reg(estargz.TOCTarName, text))
		blob := gzipped(archive)
		extra := fmt.Appendf([]byte("SG\x16\x00"), "%016xSTARGZ", len(blob))
		return chunked{ocispec.MediaTypeImageLayerGzip, blob + gzipped(inTar) + string(estargz.CreateGzipFooter(extra)), digest.FromString(text), digest.FromString(archive + inTar)}
	}
	toc := func(text string) chunked { return tocOf(archive, text) }
	for name, test := range map[string]struct {
		layer chunked
		want  string
	}{
		"another TOC digest":    {with(good, func(c *chunked) { c.toc = x }), "annotation containerd.io/snapshot/stargz/toc.digest is"},
		"no TOC digest":         {with(good, func(c *chunked) { c.toc = "yes" }), "toc.digest is"},
		"another diff ID":       {with(good, func(c *chunked) { c.diffID = x }), "and a configuration of the image says " + x.String()},
		"another diff ID, zstd": {with(zstd, func(c *chunked) { c.diffID = x }), "and a configuration of the image says " + x.String()},
		// What is no such layer.
		"empty":                  {with(good, func(c *chunked) { c.blob = "" }), "no footer"},
		"short":                  {with(good, func(c *chunked) { c.blob = "x" }), "no footer"},
		"a tar archive":          {with(good, func(c *chunked) { c.blob = archive }), "no footer"},
		"gzip":                   {with(good, func(c *chunked) { c.blob = gzipped(archive) }), "no footer"},
		"cut":                    {with(good, func(c *chunked) { c.blob = c.blob[:len(c.blob)-1] }), "no footer"},
		"a footer alone":         {with(good, func(c *chunked) { c.blob = c.blob[len(c.blob)-estargz.FooterSize:] }), "its footer says"},
		"an offset at the end":   {with(good, footer(fmt.Sprintf("%016x", len(good.blob)-estargz.FooterSize))), "its footer says"},
		"an offset beyond it":    {with(good, footer("7fffffffffffffff")), "its footer says"},
		"a huge offset":          {with(good, footer("ffffffffffffffff")), "its footer says"},
		"an offset with a sign":  {with(good, footer("-000000000000001")), "its footer says"},
		"an offset of something": {with(good, footer("0000000000000001")), "table of contents can't be read"},
		"a short extra field":    {with(good, func(c *chunked) { c.blob = c.blob[:len(c.blob)-51] + shortExtra }), "no footer"},
		"more before the footer": {with(good, func(c *chunked) {
			n := len(c.blob) - estargz.FooterSize
			c.blob = c.blob[:n] + "x" + c.blob[n:]
		}), "gzip"},
		"zstd, damaged sizes": {with(zstd, func(c *chunked) {
			n := len(c.blob) - 40
			c.blob = c.blob[:n] + strings.Repeat("\xff", 16) + c.blob[n+16:]
		}), "its footer says"},
		// What is not the table of contents of the archive.
		"twice the same file": {buildLossless(t, tarOf(t, reg("a", "1"), reg("./a", "2"))), `it has the file "a" twice`},
		// What the snapshotter shows differently from how it is unpacked.
		"no directory":                {buildLossless(t, tarOf(t, reg("d/a", "1"))), `"d/a" without its directory`},
		"a directory after its files": {buildLossless(t, tarOf(t, reg("d/a", "1"), dir("d"))), `"d/a" without its directory`},
		"a file below a link": {buildLossless(t, tarOf(t, file{tar.Header{Typeflag: tar.TypeSymlink, Name: "d", Linkname: "e"}, ""}, reg("d/a", "1"))),
			`"d" is no directory`},
		"a root that is a file":       {buildLossless(t, tarOf(t, reg(".", "1"))), "its root is no directory"},
		"a link to nothing":           {buildLossless(t, tarOf(t, hardLink("a", "b"))), `hard link "a" is to "b"`},
		"a link to a later file":      {buildLossless(t, tarOf(t, hardLink("a", "b"), reg("b", "1"))), `hard link "a" is to "b"`},
		"a link to a directory":       {buildLossless(t, tarOf(t, dir("d"), hardLink("a", "/d"))), `hard link "a" is to "/d"`},
		"a link to a whiteout":        {buildLossless(t, tarOf(t, reg(".wh.x", "1"), hardLink("a", ".wh.x"))), `hard link "a" is to ".wh.x"`},
		"a whiteout of its file":      {buildLossless(t, tarOf(t, dir("d"), reg("d/x", "1"), reg("d/.wh.x", ""))), `whiteout "d/.wh.x" removes`},
		"a whiteout of the directory": {buildLossless(t, tarOf(t, dir("d"), reg("d/.wh..", ""))), `whiteout "d/.wh.." removes`},
		"files below a whiteout":      {buildLossless(t, tarOf(t, dir(".wh.d"), reg(".wh.d/a", "1"))), `".wh.d" is no directory`},
		"a sparse file":               {tocOf(sparse(t, "a"), `{"entries":[{"name":"a","type":"reg","size":1048576}]}`), "sparse files"},
		"a file more": {forged(t, archive, false, func(toc *estargz.JTOC) {
			toc.Entries = append(toc.Entries, &estargz.TOCEntry{Name: "evil", Type: "reg"})
		}), `has reg "evil", which`},
		"a file less":              {forged(t, archive, false, func(toc *estargz.JTOC) { toc.Entries = toc.Entries[:1] }), `lacks "b"`},
		"another order":            {forged(t, archive, false, func(toc *estargz.JTOC) { slices.Reverse(toc.Entries) }), `it has "x" there`},
		"another name":             {forged(t, archive, false, entry("a", func(e *estargz.TOCEntry) { e.Name = "b" })), `it has "b" there`},
		"another mode":             {forged(t, archive, false, entry("a", func(e *estargz.TOCEntry) { e.Mode = 0o4755 })), "another mode"},
		"another owner":            {forged(t, archive, false, entry("a", func(e *estargz.TOCEntry) { e.UID = 1 })), "another mode, owner"},
		"another group":            {forged(t, archive, false, entry("a", func(e *estargz.TOCEntry) { e.GID = 1 })), "another mode, owner"},
		"another time":             {forged(t, archive, false, entry("a", func(e *estargz.TOCEntry) { e.ModTime3339 = "2026-01-01T00:00:00Z" })), "time"},
		"another type":             {forged(t, archive, false, entry("a", func(e *estargz.TOCEntry) { e.Type = "symlink" })), "another type"},
		"another size":             {forged(t, archive, false, entry("a", func(e *estargz.TOCEntry) { e.Size-- })), "another type, size"},
		"another target":           {forged(t, archive, false, entry("link", func(e *estargz.TOCEntry) { e.LinkName = "/evil" })), "target"},
		"a device":                 {forged(t, archive, false, entry("a", func(e *estargz.TOCEntry) { e.DevMajor = 1 })), "device"},
		"a capability more":        {forged(t, archive, false, entry("a", func(e *estargz.TOCEntry) { e.Xattrs = map[string][]byte{"security.capability": {1}} })), "extended attributes"},
		"a capability less":        {forged(t, archive, false, entry("x", func(e *estargz.TOCEntry) { e.Xattrs = nil })), "extended attributes"},
		"another digest":           {forged(t, archive, false, entry("a", func(e *estargz.TOCEntry) { e.ChunkDigest = digest.FromString("content of b").String() })), "the chunk at 0 has the digest"},
		"no digest":                {forged(t, archive, false, entry("a", func(e *estargz.TOCEntry) { e.ChunkDigest = "" })), "the chunk at 0 has the digest"},
		"a short chunk":            {forged(t, archive, false, entry("a", func(e *estargz.TOCEntry) { e.ChunkSize = 1; e.ChunkDigest = digest.FromString("c").String() })), "no chunk at 1"},
		"a long chunk":             {forged(t, archive, false, entry("a", func(e *estargz.TOCEntry) { e.ChunkSize = 100 })), "a chunk of 100 bytes"},
		"a negative chunk":         {forged(t, archive, false, entry("a", func(e *estargz.TOCEntry) { e.ChunkSize = -1 })), "a chunk of -1 bytes"},
		"a chunk elsewhere":        {forged(t, archive, false, entry("a", func(e *estargz.TOCEntry) { e.ChunkOffset = 1 })), "a chunk of"},
		"covered by the diff ID":   {forged(t, archive, true, entry("a", func(e *estargz.TOCEntry) { e.Mode = 0o4755 })), "another mode"},
		"an old one, with no hash": {forged(t, archive, true, func(toc *estargz.JTOC) { toc.Entries[0].ChunkDigest, toc.Entries[0].Digest = "", "" }), "digest"},
		// What is no table of contents that has one reading.
		"no JSON":         {toc(`x`), "table of contents can't be read"},
		"an array":        {toc(`[]`), "table of contents can't be read"},
		"no entries":      {toc(`{"version":1}`), "it has no entries"},
		"entries twice":   {toc(`{"entries":[],"entries":[]}`), "duplicate key"},
		"two in capitals": {toc(`{"Entries":[]}`), `can be taken for "entries"`},
		"null":            {toc(`{"entries":null}`), `lacks "a"`},
		"no list":         {toc(`{"entries":{}}`), "its entries are"},
		"a huge value":    {toc(`{"x":"` + strings.Repeat("x", maxTOCEntry) + `","entries":[]}`), "an entry has more than"},
		"a huge entry":    {toc(`{"entries":[{"name":"` + strings.Repeat("x", maxTOCEntry) + `"}]}`), "an entry has more than"},
	} {
		result := s.mustEncrypt(s.lazyImage(test.layer), kek("pilot", "a"), Options{})
		if result.Layers != 1 || result.Lazy != 0 || len(result.NotLazy) != 1 || !strings.Contains(result.NotLazy[0].Reason, test.want) || result.NotLazy[0].Digest != digest.FromString(test.layer.blob) {
			t.Errorf("%s: %+v, want %q", name, result.NotLazy, test.want)
		}
		l := s.layers(result.Target)[0]
		if _, err := s.sealed(l); !errors.Is(err, ErrNotSealed) || IsLazy(l) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// It is no layer that anybody unpacks.
	blob := s.put(good.mediaType, good.blob)
	blob.Annotations = map[string]string{tocAnnotation: good.toc.String()}
	if result := s.mustEncrypt(s.artifact(blob), kek("pilot", "a"), Options{}); result.Lazy != 0 || len(result.NotLazy) != 1 || !strings.Contains(result.NotLazy[0].Reason, "no configuration") {
		t.Errorf("an artifact: %+v", result)
	}
	// Where a manifest says something else, the layer is not sealed in any.
	otherID := s.lazyImage(with(good, func(c *chunked) { c.diffID = x }))
	result := s.mustEncrypt(s.indexOf(s.lazyImage(good), otherID), kek("pilot", "a"), Options{})
	if result.Lazy != 0 || len(result.NotLazy) != 1 {
		t.Errorf("two manifests: %+v", result)
	}
	// And one that does not say that it can be pulled lazily does not change that of others.
	unmarked := s.put(good.mediaType, good.blob)
	var m ocispec.Manifest
	if err := json.Unmarshal([]byte(s.get(s.lazyImage(good))), &m); err != nil {
		t.Fatal(err)
	}
	m.Layers = []ocispec.Descriptor{unmarked}
	doc, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	result = s.mustEncrypt(s.indexOf(s.put(ociManifest, string(doc)), s.lazyImage(good)), kek("pilot", "a"), Options{})
	if result.Lazy != 1 || len(result.NotLazy) != 0 {
		t.Errorf("with one that is not marked: %+v", result)
	}
}

// shortExtra is a gzip member of 51 bytes whose extra field is shorter than it says.
var shortExtra = "\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff\x04\x00SG\x16\x00" + "\x01\x00\x00\xff\xff" + strings.Repeat("\x00", 30)

// TestLikeSealsAnewWhatOthersSealed takes layers over from an earlier image, whose seals
// somebody may have made who can write it.
func TestLikeSealsAnewWhatOthersSealed(t *testing.T) {
	newKEKs(t, "a", "b")
	s := newStore(t)
	layer := build(t, tarOf(t, reg("a", "content")))
	plain := s.lazyImage(layer)
	desc := s.layers(plain)[0]
	was := s.layers(s.mustEncrypt(plain, kek("pilot", "a"), Options{}).Target)[0]
	reads := &readStore{store: s, read: map[digest.Digest]bool{}}
	encrypt := func(like ocispec.Descriptor) (Lazy, bool) {
		t.Helper()
		clear(reads.read)
		to := kek("pilot", "a")
		to.Keys = s.dc
		result, err := Encrypt(s.ctx, reads, plain, to, Options{Like: s.likeLayers(like)})
		if err != nil || result.Reused.Layers != 1 || result.Lazy != 1 || len(result.NotLazy) > 0 {
			t.Fatalf("%+v, %v", result, err)
		}
		s.mustComeBack(result, plain)
		l, err := s.sealed(s.layers(result.Target)[0])
		if err != nil {
			t.Fatal(err)
		}
		return l, reads.read[desc.Digest]
	}
	want, read := encrypt(was)
	if read || want.DiffID != layer.diffID {
		t.Errorf("%+v; the plain layer was read: %v", want, read)
	}
	key, err := processor.Unwrap(s.ctx, s.dc, was)
	if err != nil {
		t.Fatal(err)
	}
	// An earlier version did not wrap what it sealed.
	to := kek("pilot", "a")
	to.Keys = s.dc
	old := was
	old.Annotations = maps.Clone(was.Annotations)
	wrapped, err := key.WithSealed(nil).Wrap(s.ctx, to, nil)
	if err != nil {
		t.Fatal(err)
	}
	maps.Copy(old.Annotations, wrapped)
	if _, err := s.sealed(old); err == nil {
		t.Error("the seal of the earlier version is wrapped")
	}
	if got, read := encrypt(old); got != want || read {
		t.Errorf("of an earlier version: %+v; the plain layer was read: %v", got, read)
	}
	// Somebody with the layer's key seals something else.
	x := digest.FromString("x")
	for name, change := range map[string]func(*Lazy){
		"diff ID": func(l *Lazy) { l.DiffID = x },
		"TOC":     func(l *Lazy) { l.TOC = x },
	} {
		l := want
		change(&l)
		forged := was
		forged.Annotations = maps.Clone(was.Annotations)
		if forged.Annotations[lazyAnnotation], err = l.annotation(key); err != nil {
			t.Fatal(err)
		}
		forged.Annotations[tocAnnotation] = l.TOC.String()
		if got, read := encrypt(forged); got != want || !read {
			t.Errorf("another %s: %+v; the plain layer was read: %v", name, got, read)
		}
	}
	// The annotation is missing or damaged, or nobody knows who has sealed it.
	for name, change := range map[string]func(map[string]string){
		"no":        func(a map[string]string) { delete(a, lazyAnnotation) },
		"a damaged": func(a map[string]string) { a[lazyAnnotation] = "{}" },
		"a seal of somebody who may not use the KEK": func(a map[string]string) { delete(a, layerSealAnnotation) },
	} {
		changed := was
		changed.Annotations = maps.Clone(was.Annotations)
		change(changed.Annotations)
		if got, read := encrypt(changed); got != want || !read {
			t.Errorf("%s annotation: %+v; the plain layer was read: %v", name, got, read)
		}
	}
}

// TestSealIsForeseenWhenPlanning checks the length of the annotation that is planned with.
func TestSealIsForeseenWhenPlanning(t *testing.T) {
	short, err := annotationsAsLong(false)
	if err != nil {
		t.Fatal(err)
	}
	long, err := annotationsAsLong(true)
	if err != nil {
		t.Fatal(err)
	}
	if len(long) != len(short)+1 || len(long[lazyAnnotation]) > maxLazyAnnotation {
		t.Errorf("%v", long)
	}
	_, layer, _ := sealedLayer(t)
	if len(layer.Annotations[lazyAnnotation]) > len(long[lazyAnnotation]) {
		t.Error("a layer's annotation is longer than foreseen")
	}
}

// TestSealedImageOfARegistryWriter has somebody change encrypted images who can write to
// the registry and knows the plain layers, but no key.
func TestSealedImageOfARegistryWriter(t *testing.T) {
	newKEKs(t, "a")
	s := newStore(t)
	first, second := build(t, tarOf(t, reg("a", "content of a"))), build(t, tarOf(t, reg("b", "content of b")))
	was := s.layers(s.mustEncrypt(s.lazyImage(first, second), kek("pilot", "a"), Options{}).Target)
	// The same plain layer, encrypted with another key.
	other := s.layers(s.mustEncrypt(s.lazyImage(first), kek("pilot", "a"), Options{}).Target)[0]
	const keys = keysPrefix + "provider.pilot"
	for name, change := range map[string]func(l *ocispec.Descriptor){
		"seal of the other layer":            func(l *ocispec.Descriptor) { l.Annotations[lazyAnnotation] = was[1].Annotations[lazyAnnotation] },
		"seal of the layer in another image": func(l *ocispec.Descriptor) { l.Annotations[lazyAnnotation] = other.Annotations[lazyAnnotation] },
		"key of the other layer":             func(l *ocispec.Descriptor) { l.Annotations[keys] = was[1].Annotations[keys] },
		"key of the layer in another image":  func(l *ocispec.Descriptor) { l.Annotations[keys] = other.Annotations[keys] },
		"key and seal of the other layer": func(l *ocispec.Descriptor) {
			l.Annotations[keys], l.Annotations[lazyAnnotation] = was[1].Annotations[keys], was[1].Annotations[lazyAnnotation]
			l.Size++
		},
		"TOC digest of the other layer": func(l *ocispec.Descriptor) { l.Annotations[tocAnnotation] = second.toc.String() },
		"size":                          func(l *ocispec.Descriptor) { l.Size-- },
		"a seal without a key": func(l *ocispec.Descriptor) {
			forged := Lazy{digest.FromString(first.blob), l.Size, second.diffID, first.toc, l.Size - 60, digest.FromString("tail")}
			l.Annotations[lazyAnnotation], _ = forged.annotation(processor.NewLayerKey(forged.Plain))
		},
	} {
		l := was[0]
		l.Annotations = maps.Clone(l.Annotations)
		change(&l)
		if got, err := s.sealed(l); !errors.Is(err, processor.ErrTampered) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	// Another blob, key and seal, all of another image: it is sealed, as what it is.
	if got, err := s.sealed(was[1]); err != nil || got.DiffID != second.diffID || got.Plain != digest.FromString(second.blob) {
		t.Errorf("%+v, %v", got, err)
	}
}

// FuzzLazyCheck checks layers that somebody made who wants to be sealed, or to stop the program
// that encrypts them.
func FuzzLazyCheck(f *testing.F) {
	archive := tarOf(f, reg("a", "content"), dir("d"), reg("d/b", strings.Repeat("x", 3000)))
	chunks := estargz.WithChunkSize(1000)
	for _, c := range []chunked{build(f, archive, chunks), buildLossless(f, archive), buildZstd(f, archive)} {
		f.Add([]byte(c.blob), c.toc.String(), c.diffID.String())
	}
	f.Fuzz(func(t *testing.T, blob []byte, toc, diffID string) {
		if len(blob) > 1<<20 {
			return
		}
		desc := ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(blob), Size: int64(len(blob)), Data: blob,
			Annotations: map[string]string{tocAnnotation: toc},
		}
		c, err := (&work{}).newLazyCheck(t.Context(), desc)
		if err != nil {
			return
		}
		half := len(blob) / 2
		_, _ = c.Write(blob[:half])
		_, _ = c.Write(blob[half:])
		l, err := c.lazy([]digest.Digest{digest.Digest(diffID)})
		if err != nil {
			return
		}
		// What is sealed is what the library sees.
		r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(blob), 0, int64(len(blob))), estargz.WithDecompressors(new(zstdchunked.Decompressor)))
		if err != nil || r.TOCDigest() != l.TOC || l.DiffID.String() != diffID {
			t.Errorf("%+v; the library: %v", l, err)
		}
	})
}

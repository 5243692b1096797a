package image

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// sealedLayer returns the descriptor of an encrypted layer, with its key and what that has
// sealed.
func sealedLayer(t *testing.T) (*processor.LayerKey, ocispec.Descriptor, Lazy) {
	t.Helper()
	key := processor.NewLayerKey(digest.FromString("plain"))
	l := Lazy{
		Plain: key.Digest, Size: 1000, DiffID: digest.FromString("diff"), TOC: digest.FromString("toc"),
		TailOffset: 900, Tail: digest.FromString("tail"),
	}
	text, err := l.annotation(key)
	if err != nil {
		t.Fatal(err)
	}
	return key, ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageLayerGzip + "+encrypted", Digest: digest.FromString("blob"), Size: l.Size,
		Annotations: map[string]string{lazyAnnotation: text, tocAnnotation: l.TOC.String()},
	}, l
}

func TestSealedLazyReturnsWhatWasSealed(t *testing.T) {
	key, layer, want := sealedLayer(t)
	if got, err := SealedLazy(key, layer); err != nil || got != want {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
	text := layer.Annotations[lazyAnnotation]
	// In another order and with white space it says the same.
	first, rest, _ := strings.Cut(strings.Trim(text, "{}"), ",")
	layer.Annotations[lazyAnnotation] = " {" + rest + " ,\n" + first + "} "
	if got, err := SealedLazy(key, layer); err != nil || got != want {
		t.Errorf("in another order: %+v, %v, want %+v", got, err, want)
	}
	delete(layer.Annotations, lazyAnnotation)
	if _, err := SealedLazy(key, layer); !errors.Is(err, ErrNotSealed) || errors.Is(err, processor.ErrTampered) {
		t.Errorf("without the annotation: %v", err)
	}
}

func TestSealedLazyRefusesWhatTheKeyHasNotSealed(t *testing.T) {
	key, layer, l := sealedLayer(t)
	otherKey, otherLayer, _ := sealedLayer(t)
	text := layer.Annotations[lazyAnnotation]
	in := func(old, new string) func(*ocispec.Descriptor) {
		if !strings.Contains(text, old) {
			t.Fatalf("there is no %s in %s", old, text)
		}
		return func(d *ocispec.Descriptor) {
			d.Annotations[lazyAnnotation] = strings.Replace(text, old, new, 1)
		}
	}
	whole := func(text string) func(*ocispec.Descriptor) {
		return func(d *ocispec.Descriptor) { d.Annotations[lazyAnnotation] = text }
	}
	const sha512 = "sha512:cf83e1357eefb8bdf1542850d66d8007d620e4050b5715dc83f4a921d36ce9ce47d0d13c5d85f2b0ff8318d2877eec2f63b931bd47417a81a538327af927da3e"
	x := digest.FromString("x").String()
	for name, test := range map[string]struct {
		change func(*ocispec.Descriptor)
		want   string
	}{
		// What it says.
		"diff ID":              {in(l.DiffID.String(), x), "does not match the layer's key"},
		"TOC":                  {in(l.TOC.String(), x), "does not match the layer's key"},
		"tail":                 {in(l.Tail.String(), x), "does not match the layer's key"},
		"diff ID and TOC swap": {in(`"diffID":"`+l.DiffID.String()+`","toc":"`+l.TOC.String()+`"`, `"diffID":"`+l.TOC.String()+`","toc":"`+l.DiffID.String()+`"`), "does not match the layer's key"},
		"tail's offset":        {in(":900,", ":901,"), "does not match the layer's key"},
		"seal":                 {in(`"seal":"`, `"seal":"AAAA`), "does not match the layer's key"},
		"no seal":              {in(`,"seal":"`, `,"x":"`), "seal is missing"},
		"an empty seal":        {whole(text[:strings.Index(text, `"seal"`)] + `"seal":""}`), "does not match the layer's key"},
		"a null seal":          {whole(text[:strings.Index(text, `"seal"`)] + `"seal":null}`), "does not match the layer's key"},
		// What it is of.
		"size":                      {func(d *ocispec.Descriptor) { d.Size++ }, "does not match the layer's key"},
		"another layer's":           {whole(otherLayer.Annotations[lazyAnnotation]), "does not match the layer's key"},
		"annotation of the TOC":     {func(d *ocispec.Descriptor) { d.Annotations[tocAnnotation] = x }, tocAnnotation},
		"no annotation of the TOC":  {func(d *ocispec.Descriptor) { delete(d.Annotations, tocAnnotation) }, tocAnnotation},
		"a smaller layer":           {func(d *ocispec.Descriptor) { d.Size = 900 }, "tailOffset is 900, and the layer has 900 bytes"},
		"a layer of negative size":  {func(d *ocispec.Descriptor) { d.Size = -1 }, "tailOffset is 900"},
		"a tail beyond the end":     {in(":900,", ":1000,"), "tailOffset is 1000, and the layer has 1000 bytes"},
		"a negative offset":         {in(":900,", ":-1,"), "tailOffset is -1"},
		"no SHA-256":                {in(l.DiffID.String(), sha512), "diffID is"},
		"a digest in capitals":      {in(l.Tail.String(), strings.ToUpper(l.Tail.String())), "tail is"},
		"a digest with a space":     {in(l.TOC.String(), l.TOC.String()+" "), "toc is"},
		"no digest":                 {in(l.TOC.String(), ""), "toc is"},
		"an offset with a fraction": {in(":900,", ":900.5,"), "900.5"},
		"an offset as a power":      {in(":900,", ":9e2,"), "9e2"},
		"a huge offset":             {in(":900,", ":9223372036854775808,"), "9223372036854775808"},
		"an enormous offset":        {in(":900,", ":1e400,"), "1e400"},
		"an offset in quotes":       {in(":900,", `:"900",`), "string"},
		// How it says it.
		"a key twice":            {in(`{`, `{"toc":"`+x+`",`), "duplicate key"},
		"a key in other letters": {in(`{`, `{"TOC":"`+x+`",`), "can be taken for"},
		"one member more":        {in(`{`, `{"x":1,`), "unknown field"},
		"two values":             {whole(text + text), "not JSON"},
		"something after it":     {whole(text + "x"), "not JSON"},
		"cut":                    {whole(text[:len(text)-1]), "not JSON"},
		"nothing":                {whole(""), "not JSON"},
		"null":                   {whole("null"), "not a JSON object"},
		"an array":               {whole("[" + text + "]"), "not a JSON object"},
		"deep":                   {whole(strings.Repeat("[", 1000)), "not JSON"},
		"long":                   {whole(text + strings.Repeat(" ", maxLazyAnnotation)), "more than 1024"},
	} {
		d := layer
		d.Annotations = maps.Clone(layer.Annotations)
		test.change(&d)
		_, err := SealedLazy(key, d)
		if !errors.Is(err, processor.ErrTampered) || errors.Is(err, ErrNotSealed) || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), lazyAnnotation) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
	}
	if _, err := SealedLazy(otherKey, layer); !errors.Is(err, processor.ErrTampered) {
		t.Errorf("with another layer's key: %v", err)
	}
	for _, plain := range []digest.Digest{"", digest.FromString("another")} {
		had := key.Digest
		key.Digest = plain
		if _, err := SealedLazy(key, layer); !errors.Is(err, processor.ErrTampered) {
			t.Errorf("with a key of plain layer %q: %v", plain, err)
		}
		key.Digest = had
	}
}

func TestEachByteOfTheLazyAnnotationCounts(t *testing.T) {
	key, layer, want := sealedLayer(t)
	text := layer.Annotations[lazyAnnotation]
	for i := range len(text) {
		for _, bit := range []byte{1, 0x20} {
			b := []byte(text)
			b[i] ^= bit
			layer.Annotations[lazyAnnotation] = string(b)
			got, err := SealedLazy(key, layer)
			if err == nil && got == want {
				continue // the last bits of base64 stand for nothing
			}
			if !errors.Is(err, processor.ErrTampered) {
				t.Errorf("byte %d ^ %#x: %+v, %v", i, bit, got, err)
			}
		}
	}
}

func TestNothingIsSealedThatCouldNotBeRead(t *testing.T) {
	key, _, l := sealedLayer(t)
	for name, change := range map[string]func(*Lazy){
		"no plain digest": func(l *Lazy) { l.Plain = "" },
		"no diff ID":      func(l *Lazy) { l.DiffID = "" },
		"tail at the end": func(l *Lazy) { l.TailOffset = l.Size },
		"negative":        func(l *Lazy) { l.TailOffset = -1 },
	} {
		l := l
		change(&l)
		if text, err := l.annotation(key); err == nil {
			t.Errorf("%s: %s", name, text)
		}
	}
}

func FuzzLazyAnnotation(f *testing.F) {
	key := processor.NewLayerKey(digest.FromString("plain"))
	l := Lazy{Plain: key.Digest, Size: 1000, DiffID: digest.FromString("diff"), TOC: digest.FromString("toc"), TailOffset: 900, Tail: digest.FromString("tail")}
	text, err := l.annotation(key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text, int64(1000))
	f.Add(strings.Replace(text, "900", strconv.Itoa(1<<62), 1), int64(1000))
	f.Fuzz(func(t *testing.T, text string, size int64) {
		got, err := SealedLazy(key, ocispec.Descriptor{Size: size, Annotations: map[string]string{lazyAnnotation: text, tocAnnotation: l.TOC.String()}})
		if err == nil && got != l || err != nil && !errors.Is(err, processor.ErrTampered) {
			t.Errorf("%+v, %v", got, err)
		}
	})
}

// wrappedAsIs is a key provider whose annotations are the layer keys.
type wrappedAsIs struct{}

func (wrappedAsIs) WrapKey(_ context.Context, _ [][]byte, layerKey []byte) ([]byte, error) {
	return layerKey, nil
}

func (wrappedAsIs) UnwrapKey(_ context.Context, _ [][]byte, annotation []byte) ([]byte, error) {
	return annotation, nil
}

// TestLazyVector reads an annotation that was made by docs/formats.md, with Python's hmac
// and hashlib.
func TestLazyVector(t *testing.T) {
	text, err := os.ReadFile("testdata/lazy.json")
	if err != nil {
		t.Fatal(err)
	}
	var v struct {
		LayerKey json.RawMessage
		Layer    ocispec.Descriptor
		Sealed   string
	}
	if err := json.Unmarshal(text, &v); err != nil {
		t.Fatal(err)
	}
	l := v.Layer
	l.Annotations[keysPrefix+"provider.none"] = base64.StdEncoding.EncodeToString(v.LayerKey)
	l.Annotations[processor.AnnotationPrefix+"pubopts"] = base64.StdEncoding.EncodeToString(fmt.Appendf(nil, `{"cipher":"AES_256_CTR_HMAC_SHA256","hmac":%q,"cipheroptions":{}}`, base64.StdEncoding.EncodeToString(make([]byte, 32))))
	key, err := processor.Unwrap(t.Context(), processor.Keys{Providers: map[string]processor.KeyProvider{"none": wrappedAsIs{}}}, l)
	if err != nil {
		t.Fatal(err)
	}
	got, err := SealedLazy(key, l)
	if err != nil {
		t.Fatal(err)
	}
	if said := fmt.Sprintf("%s %d %s %s %d %s", got.Plain, got.Size, got.DiffID, got.TOC, got.TailOffset, got.Tail); said != v.Sealed {
		t.Errorf("%s was sealed, not %s", said, v.Sealed)
	}
	if again, err := got.annotation(key); err != nil || again != l.Annotations[lazyAnnotation] {
		t.Errorf("%s, %v", again, err)
	}
}

package image

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// manifestOf puts a manifest of layers.
func (s *store) manifestOf(layers ...ocispec.Descriptor) ocispec.Descriptor {
	conf := s.put(ocispec.MediaTypeImageConfig, `{"architecture":"amd64","os":"linux"}`)
	var list []string
	for _, l := range layers {
		list = append(list, `{"mediaType":"`+l.MediaType+`",`+ref(l)+`}`)
	}
	return s.put(ociManifest, `{"schemaVersion":2,"mediaType":"`+ociManifest+`","config":{"mediaType":"`+conf.MediaType+`",`+ref(conf)+`},"layers":[`+strings.Join(list, ",")+`]}`)
}

func (s *store) indexOf(children ...ocispec.Descriptor) ocispec.Descriptor {
	var list []string
	for i, c := range children {
		// Each for another platform, so that no two entries are the same.
		list = append(list, fmt.Sprintf(`{"mediaType":"%s",%s,"platform":{"architecture":"amd64","os":"linux","variant":"v%d"}}`, c.MediaType, ref(c), i))
	}
	return s.put(ociIndex, `{"schemaVersion":2,"manifests":[`+strings.Join(list, ",")+`]}`)
}

// reads counts what is opened of a store.
type reads struct {
	content.Store
	n int
}

func (r *reads) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	r.n++
	return r.Store.ReaderAt(ctx, desc)
}

// TestNestedIndexes works on an image of few documents and many paths to them.
func TestNestedIndexes(t *testing.T) {
	s := newStore(t)
	layer := s.put(ocispec.MediaTypeImageLayer, "layer")
	target := s.manifestOf(layer)
	for range maxDepth {
		target = s.indexOf(target, target, target, target, target)
	}
	r := &reads{Store: s}
	encrypted, err := Encrypt(s.ctx, r, target, s.ec, Options{})
	if err != nil || encrypted.Layers != 1 {
		t.Fatalf("encrypt: %+v, %v", encrypted, err)
	}
	// 41 documents with their platforms, twice; 5^8 paths.
	if r.n > 1000 {
		t.Errorf("encrypt opened %d documents", r.n)
	}
	if layers, err := Layers(s.ctx, s, encrypted.Target, Options{}); err != nil || len(layers) != 5 {
		t.Errorf("%d layers, %v", len(layers), err) // for five platforms
	}
	again, err := Rewrap(s.ctx, s, encrypted.Target, Rewrapping{Keys: s.dc, Add: s.ec.Parameters}, Options{})
	if err != nil || again.Layers != 1 || again.Encrypted != 1 {
		t.Errorf("rewrap: %+v, %v", again, err)
	}
	decrypted, err := Decrypt(s.ctx, s, again.Target, s.dc, Options{})
	if err != nil || decrypted.Layers != 1 || decrypted.Target.Digest != target.Digest {
		t.Errorf("decrypt: %+v, %v", decrypted, err)
	}
}

// TestLimits has every way in refuse images that are too large.
func TestImageLimits(t *testing.T) {
	s := newStore(t)
	layer := s.put(ocispec.MediaTypeImageLayer, "layer")
	deep := s.manifestOf(layer)
	for range maxDepth + 1 {
		deep = s.indexOf(deep)
	}
	many := slices.Repeat([]ocispec.Descriptor{s.manifestOf(layer)}, maxDocuments) // for as many platforms
	layers := slices.Repeat([]ocispec.Descriptor{layer}, 2001)
	for _, test := range []struct {
		name   string
		target ocispec.Descriptor
		want   string
	}{
		{"deep", deep, "indexes are nested more than 8 deep"},
		{"wide", s.indexOf(many...), "more than 1000 manifests and indexes"},
		{"layers", s.indexOf(slices.Repeat([]ocispec.Descriptor{s.manifestOf(layers...)}, 5)...), "more than 10000 layers"},
	} {
		_, encryptErr := Encrypt(s.ctx, s, test.target, s.ec, Options{})
		_, decryptErr := Decrypt(s.ctx, s, test.target, s.dc, Options{})
		_, rewrapErr := Rewrap(s.ctx, s, test.target, Rewrapping{Keys: kekOnly}, Options{})
		_, layersErr := Layers(s.ctx, s, test.target, Options{})
		for i, err := range []error{encryptErr, decryptErr, rewrapErr, layersErr} {
			if !errors.Is(err, ErrLimit) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%s, %d: %v", test.name, i, err)
			}
		}
	}
}

// TestLimitsAreCheckedBeforeLayersAreRead encrypts images that can't be, and whose first layer can't be
// read either: that the layer was not read shows in which error it is.
func TestLimitsAreCheckedBeforeLayersAreRead(t *testing.T) {
	s := newStore(t)
	unreadable := s.put(ocispec.MediaTypeImageLayer, "first layer")
	unreadable.Size++
	many := s.put(ocispec.MediaTypeImageLayer, "second layer")
	second, err := Encrypt(s.ctx, s, s.manifestOf(many), s.ec, Options{})
	if err != nil {
		t.Fatal(err)
	}
	full := second.Target
	for range processor.MaxWrappedKeys - 1 {
		out, err := Rewrap(s.ctx, s, full, Rewrapping{Keys: s.dc, Add: s.ec.Parameters}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		full = out.Target
	}
	if _, err := Rewrap(s.ctx, s, full, Rewrapping{Keys: s.dc, Add: s.ec.Parameters}, Options{}); !errors.Is(err, processor.ErrTooManyRecipients) {
		t.Errorf("rewrap with one recipient too many: %v", err)
	}
	if _, err := Decrypt(s.ctx, s, full, s.dc, Options{}); err != nil {
		t.Errorf("with as many wrapped keys as there may be: %v", err)
	}
	ec := processor.Recipients{Keys: s.dc, Parameters: s.ec.Parameters}
	if _, err := Encrypt(s.ctx, s, s.indexOf(s.manifestOf(unreadable), full), ec, Options{}); !errors.Is(err, processor.ErrTooManyRecipients) {
		t.Errorf("one recipient too many: %v", err)
	}

	layers := slices.Repeat([]ocispec.Descriptor{unreadable}, 6000)
	if _, err := Encrypt(s.ctx, s, s.manifestOf(layers...), s.ec, Options{}); !errors.Is(err, ErrLimit) || !strings.Contains(err.Error(), "registries take at most 4194304") {
		t.Errorf("large manifest: %v", err)
	}
	if _, err := Encrypt(s.ctx, s, s.manifestOf(unreadable), s.ec, Options{}); err == nil || !strings.Contains(err.Error(), "the manifest says") {
		t.Errorf("unreadable layer: %v", err)
	}
	s.noIngests()
}

// TestAddRecipientsWithoutLayers adds recipients to an image whose layers are not
// in the store.
func TestAddRecipientsWithoutLayers(t *testing.T) {
	s := newStore(t)
	layer := s.put(ocispec.MediaTypeImageLayer, "layer")
	encrypted, err := Encrypt(s.ctx, s, s.indexOf(s.manifestOf(layer)), s.ec, Options{})
	if err != nil {
		t.Fatal(err)
	}
	layers, err := Layers(s.ctx, s, encrypted.Target, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(s.ctx, layers[0].Descriptor.Digest); err != nil {
		t.Fatal(err)
	}
	ec := processor.Recipients{Keys: s.dc, Parameters: s.ec.Parameters}
	both, err := Encrypt(s.ctx, s, encrypted.Target, ec, Options{})
	if err != nil || both.Layers != 1 {
		t.Fatalf("%+v, %v", both, err)
	}
	if layers, err = Layers(s.ctx, s, both.Target, Options{}); err != nil || len(recipientsOf(layers[0].Descriptor.Annotations)) != 2 {
		t.Errorf("%+v, %v", layers, err)
	}
}

// TestOnlyLayersAboveTheBaseAreEncrypted encrypts what the base image does not have.
func TestOnlyLayersAboveTheBaseAreEncrypted(t *testing.T) {
	s := newStore(t)
	base, own := s.put(ocispec.MediaTypeImageLayer, "base"), s.put(ocispec.MediaTypeImageLayer, "own")
	target := s.indexOf(s.manifestOf(base, own), s.manifestOf(own))
	out, err := Encrypt(s.ctx, s, target, s.ec, Options{Base: []ocispec.Descriptor{base}})
	if err != nil || out.Layers != 1 {
		t.Fatalf("%+v, %v", out, err)
	}
	if want := []string{"platform linux/amd64/v1 has no layer of the base image"}; fmt.Sprint(out.Lacking) != fmt.Sprint(want) {
		t.Errorf("lacking: %q", out.Lacking)
	}
	layers, err := Layers(s.ctx, s, out.Target, Options{})
	if err != nil || layers[0].Descriptor.Digest != base.Digest || !processor.IsEncrypted(layers[1].Descriptor.MediaType) {
		t.Errorf("%+v, %v", layers, err)
	}
	stranger := ocispec.Descriptor{Digest: digest.FromString("stranger")}
	if _, err := Encrypt(s.ctx, s, target, s.ec, Options{Base: []ocispec.Descriptor{stranger}}); err == nil || !strings.Contains(err.Error(), "not built on it") {
		t.Errorf("stranger: %v", err)
	}
	out, err = Encrypt(s.ctx, s, target, s.ec, Options{Layers: []int{1}})
	if want := []string{"platform linux/amd64/v1 has 1 layers, and no layer 1"}; err != nil || fmt.Sprint(out.Lacking) != fmt.Sprint(want) {
		t.Errorf("lacking: %q, %v", out.Lacking, err)
	}
}

// TestRewrapBoundsTheKEKsItTries rewraps a layer to which someone added more KEKs than are tried.
func TestRewrapBoundsTheKEKsItTries(t *testing.T) {
	newKEKs(t, "a", "b")
	s := newStore(t)
	ec := kek("pilot", "a")
	encrypted, err := Encrypt(s.ctx, s, s.manifestOf(s.put(ocispec.MediaTypeImageLayer, "layer")), ec, Options{})
	if err != nil {
		t.Fatal(err)
	}
	add := func(n int) ocispec.Descriptor {
		doc := s.get(encrypted.Target)
		for i := range n {
			var forged []string
			for j := range 50 {
				forged = append(forged, fmt.Sprintf(`{"method":"A256GCMKW","kekId":"forged-%d-%d","kekVersion":1,"iv":"AAAAAAAAAAAAAAAA","wrappedKey":"%s"}`, i, j, strings.Repeat("A", 64)))
			}
			text := base64.StdEncoding.EncodeToString([]byte("[" + strings.Join(forged, ",") + "]"))
			doc = strings.Replace(doc, `keys.provider.pilot":"`, `keys.provider.pilot":"`+text+",", 1)
		}
		return s.put(encrypted.Target.MediaType, doc)
	}
	how := Rewrapping{Keys: kekOnly, From: "a", To: "b"}
	if out, err := Rewrap(s.ctx, s, add(5), how, Options{}); err != nil || out.Layers != 1 {
		t.Errorf("250 KEKs: %+v, %v", out, err)
	}
	if _, err := Rewrap(s.ctx, s, add(6), how, Options{}); !errors.Is(err, ErrLimit) {
		t.Errorf("300 KEKs: %v", err)
	}
	if _, err := Rewrap(s.ctx, s, add(64), how, Options{}); !errors.Is(err, processor.ErrTooManyRecipients) {
		t.Errorf("65 wrapped keys: %v", err)
	}
}

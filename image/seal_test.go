package image

import (
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestAnnotationsOfAnotherEncryptionComeBack encrypts plain layers that have such
// annotations, and decrypts them in several ways.
func TestAnnotationsOfAnotherEncryptionComeBack(t *testing.T) {
	s := newStore(t)
	a, b := s.put(ocispec.MediaTypeImageLayerGzip, "layer a"), s.put(dockerGzip, "layer b")
	stale := func(desc ocispec.Descriptor, value string) string {
		return strings.TrimSuffix(entry(desc), "}") + `, "annotations" : { "a":"b", "org.opencontainers.image.enc.keys.jwe":"` + value + `","org.opencontainers.image.enc.\u0078":"y" } }`
	}
	target := s.manifest(ociManifest, stale(a, "AAAA")+" ,"+stale(b, "CCCC"), "")
	encrypt := func(target ocispec.Descriptor, layers ...int) ocispec.Descriptor {
		t.Helper()
		ec := s.ec
		ec.Keys = s.dc
		result, err := Encrypt(s.ctx, s, target, ec, Options{Layers: layers})
		if err != nil {
			t.Fatal(err)
		}
		return result.Target
	}
	decrypt := func(target ocispec.Descriptor, layers ...int) ocispec.Descriptor {
		t.Helper()
		result, err := Decrypt(s.ctx, s, target, s.dc, Options{Layers: layers})
		if err != nil {
			t.Fatal(err)
		}
		return result.Target
	}
	whole := encrypt(target)
	if m := s.parsed(whole); m.Layers[0].Annotations["org.opencontainers.image.enc.keys.jwe"] == "AAAA" || m.Layers[0].Annotations["org.opencontainers.image.enc.x"] != "" {
		t.Errorf("the encrypted layer has annotations %v", m.Layers[0].Annotations)
	}
	for name, got := range map[string]ocispec.Descriptor{
		"at once":               decrypt(whole),
		"layer by layer":        decrypt(decrypt(whole, 0), 1),
		"encrypted in steps":    decrypt(encrypt(encrypt(target, 1), 0)),
		"back and forth":        decrypt(encrypt(decrypt(whole, 1), 1)),
		"with more recipients":  decrypt(encrypt(whole)),
		"after an other's turn": decrypt(encrypt(decrypt(encrypt(decrypt(whole, 0), 0), 1), 1), 1, 0),
	} {
		if got.Digest != target.Digest {
			t.Errorf("%s: came back as\n%s\nwas\n%s", name, s.get(got), s.get(target))
		}
	}
	// The author of the annotation has no layer key to seal it with.
	forged := s.put(whole.MediaType, strings.Replace(s.get(whole), "AAAA", "BBBB", 1))
	first, second := s.parsed(decrypt(forged)).Layers[0], s.parsed(decrypt(forged)).Layers[1]
	if len(first.Annotations) != 1 || len(second.Annotations) != 3 {
		t.Errorf("forged, they came back as %v and %v", first.Annotations, second.Annotations)
	}
}

package image

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// builtOn returns an image of the layers given without their annotations, and a
// plain layer on top, as BuildKit builds it.
func (s *store) builtOn(layers []ocispec.Descriptor) ocispec.Descriptor {
	s.t.Helper()
	layers = slices.Clone(layers)
	for i := range layers {
		layers[i].Annotations = nil
	}
	layers = append(layers, s.put(ocispec.MediaTypeImageLayer, "what was built"))
	doc, err := json.Marshal(ocispec.Manifest{MediaType: ociManifest, Config: s.put(ocispec.MediaTypeImageConfig, `{}`), Layers: layers})
	if err != nil {
		s.t.Fatal(err)
	}
	return s.put(ociManifest, string(doc))
}

func (s *store) layers(target ocispec.Descriptor) []ocispec.Descriptor {
	s.t.Helper()
	list, err := Layers(s.ctx, s, target, Options{})
	if err != nil {
		s.t.Fatal(err)
	}
	descs := make([]ocispec.Descriptor, len(list))
	for i, l := range list {
		descs[i] = l.Descriptor
	}
	return descs
}

func TestKeysComeFromTheBaseImage(t *testing.T) {
	s := newStore(t)
	plain := []ocispec.Descriptor{s.put(ocispec.MediaTypeImageLayer, "base 0"), s.put(ocispec.MediaTypeImageLayer, "base 1")}
	base := s.put(ociManifest, fmt.Sprintf(`{"schemaVersion": 2, "mediaType": %q, "config": {"mediaType": %q, %s}, "layers": [{"mediaType": %q, %s}, {"mediaType": %q, %s}]}`,
		ociManifest, ocispec.MediaTypeImageConfig, ref(s.put(ocispec.MediaTypeImageConfig, `{}`)), ocispec.MediaTypeImageLayer, ref(plain[0]), ocispec.MediaTypeImageLayer, ref(plain[1])))
	encrypted, err := Encrypt(s.ctx, s, base, s.ec, Options{})
	if err != nil {
		t.Fatal(err)
	}
	of := s.layers(encrypted.Target)
	built := s.builtOn(of)
	ec := s.ec
	ec.Keys = s.dc
	// The key of layer 1 in the place of that of layer 0, by mistake or by
	// somebody who can write to the registry.
	wrong := of[0]
	wrong.Annotations = of[1].Annotations
	half := of[0]
	half.Annotations = maps.Clone(of[0].Annotations)
	half.Annotations["org.opencontainers.image.enc.pubopts"] = of[1].Annotations["org.opencontainers.image.enc.pubopts"]

	for name, test := range map[string]struct {
		from []ocispec.Descriptor
		want string
	}{
		"none":              {nil, "is encrypted and has no keys, as BuildKit leaves"},
		"of another image":  {of[1:], of[0].Digest.String() + ": it is encrypted and has no keys"},
		"built itself":      {s.layers(built), "is encrypted and has no keys"},
		"of another layer":  {[]ocispec.Descriptor{wrong, of[1]}, "can't be taken from the base image"},
		"HMAC of another":   {[]ocispec.Descriptor{half, of[1]}, "can't be taken from the base image"},
		"base":              {of, ""},
		"wrong, then right": {append([]ocispec.Descriptor{wrong, half}, of...), ""},
	} {
		t.Run(name, func(t *testing.T) {
			before := s.blobs()
			out, err := Encrypt(s.ctx, s, built, ec, Options{KeysFrom: test.from})
			if test.want != "" {
				if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Errorf("want %q: %v", test.want, err)
				}
				s.noIngests()
				return
			}
			if err != nil || out.Layers != 3 {
				t.Fatalf("%d layers: %v", out.Layers, err)
			}
			if n := s.blobs() - before; n != 2 {
				t.Errorf("%d blobs were written, not a layer and a manifest", n)
			}
			for i, l := range s.layers(out.Target) {
				if !processor.IsEncrypted(l.MediaType) || !processor.HasRecipients(l) || i < 2 && l.Digest != of[i].Digest {
					t.Errorf("layer %d: %+v", i, l)
				}
			}
			decrypted, err := Decrypt(s.ctx, s, out.Target, s.dc, Options{})
			if err != nil {
				t.Fatal(err)
			}
			var texts []string
			for _, l := range s.layers(decrypted.Target) {
				texts = append(texts, s.get(l))
			}
			if got := strings.Join(texts, ","); got != "base 0,base 1,what was built" {
				t.Errorf("decrypted: %s", got)
			}
		})
	}
}

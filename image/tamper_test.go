package image

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/containers/ocicrypt/config"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/ctrlplane/pilot/processor"
)

const pubopts = processor.AnnotationPrefix + "pubopts"

// parsed returns a manifest.
func (s *store) parsed(target ocispec.Descriptor) (m ocispec.Manifest) {
	s.t.Helper()
	if err := json.Unmarshal([]byte(s.get(target)), &m); err != nil {
		s.t.Fatal(err)
	}
	return m
}

// TestDecryptTampered has somebody who can write to the registry change the
// manifest of an encrypted image, whose layers stay as they are. What is found
// leaves no layer behind. What is not found is harmless: it says so.
func TestDecryptTampered(t *testing.T) {
	keys := newKEKs(t, "a", "b")
	s := newStore(t)
	const pilot, remote = keysPrefix + "provider.pilot", keysPrefix + "provider.remote"
	target := s.encrypted(kek("pilot", "a"))
	forB := s.parsed(s.encrypted(kek("pilot", "b")))
	atBroker := s.encrypted(kek("remote", "a"))
	byBroker := s.parsed(atBroker)
	rotate(t, keys, "a")
	newer := s.parsed(s.encrypted(kek("pilot", "a")))
	both, err := Encrypt(s.ctx, s, target, kek("pilot", "b"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	plain := map[string]digest.Digest{"layer a": digest.FromString("layer a"), "layer b": digest.FromString("layer b")}
	inAnnotation := func(name, old, new string) func(*ocispec.Manifest) {
		return func(m *ocispec.Manifest) {
			for _, l := range m.Layers {
				b, err := base64.StdEncoding.DecodeString(l.Annotations[name])
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Contains(b, []byte(old)) {
					t.Fatalf("there is no %s in %s", old, b)
				}
				l.Annotations[name] = base64.StdEncoding.EncodeToString(bytes.Replace(b, []byte(old), []byte(new), 1))
			}
		}
	}
	swap := func(a, b map[string]string, names ...string) {
		for _, name := range names {
			a[name], b[name] = b[name], a[name]
		}
	}
	first := func(from ocispec.Manifest, names ...string) func(*ocispec.Manifest) {
		return func(m *ocispec.Manifest) {
			for _, name := range names {
				m.Layers[0].Annotations[name] = from.Layers[0].Annotations[name]
			}
		}
	}
	const tampered, wrongKEK = "HMAC does not match", "does not unwrap this layer key"
	for _, test := range []struct {
		name   string
		target ocispec.Descriptor
		change func(m *ocispec.Manifest)
		want   string // empty: harmless
	}{
		{"nothing", target, func(*ocispec.Manifest) {}, ""},
		// Between layers.
		{"all annotations", target, func(m *ocispec.Manifest) {
			swap(m.Layers[0].Annotations, m.Layers[1].Annotations, pilot, pubopts)
		}, tampered},
		{"wrapped keys", target, func(m *ocispec.Manifest) { swap(m.Layers[0].Annotations, m.Layers[1].Annotations, pilot) }, tampered},
		{"public options", target, func(m *ocispec.Manifest) { swap(m.Layers[0].Annotations, m.Layers[1].Annotations, pubopts) }, tampered},
		{"wrapped keys of the broker's", atBroker, func(m *ocispec.Manifest) { swap(m.Layers[0].Annotations, m.Layers[1].Annotations, remote) }, tampered},
		// Between images.
		{"another KEK's wrapped key", target, first(forB, pilot), tampered},
		{"another KEK's annotations", target, first(forB, pilot, pubopts), tampered},
		{"another version's annotations", target, first(newer, pilot, pubopts), tampered},
		{"another method's annotation", target, func(m *ocispec.Manifest) {
			m.Layers[0].Annotations[pilot] = byBroker.Layers[0].Annotations[remote]
		}, tampered},
		// What an annotation says.
		{"KEK", target, inAnnotation(pilot, `"kekId":"a"`, `"kekId":"b"`), wrongKEK},
		{"no such KEK", target, inAnnotation(pilot, `"kekId":"a"`, `"kekId":"c"`), "no such KEK"},
		{"version", target, inAnnotation(pilot, `"kekVersion":1`, `"kekVersion":2`), wrongKEK},
		{"no version", target, inAnnotation(pilot, `"kekVersion":1,`, ``), wrongKEK},
		{"method original", target, inAnnotation(pilot, `A256GCMKW`, `AES-GCM`), "does not name a KEK"},
		{"method copilot", target, inAnnotation(pilot, `A256GCMKW`, `copilot`), "has no IV"},
		{"method of the broker's", atBroker, inAnnotation(remote, `"A256GCMKW"`, `"AES-GCM"`), "does not name a KEK"},
		{"KEK of the broker's", atBroker, inAnnotation(remote, `"kekId":"a"`, `"kekId":"b"`), wrongKEK},
		{"version of the broker's", atBroker, inAnnotation(remote, `"kekVersion":1`, `"kekVersion":2`), wrongKEK},
		{"IV", target, inAnnotation(pilot, `"iv":"`, `"iv":"AAAA`), "IV of 15 bytes"},
		{"a member more", target, inAnnotation(pilot, `{`, `{"x":1,`), "unknown field"},
		{"provider", target, func(m *ocispec.Manifest) {
			for _, l := range m.Layers {
				l.Annotations[keysPrefix+"provider.original"] = l.Annotations[pilot]
				delete(l.Annotations, pilot)
			}
		}, ""}, // the same key, of the same KEK
		{"one of two KEKs", both.Target, func(m *ocispec.Manifest) {
			m.Layers[0].Annotations[pilot] = strings.Split(m.Layers[0].Annotations[pilot], ",")[1]
		}, ""}, // it wraps the same key
		{"no annotations", target, func(m *ocispec.Manifest) { m.Layers[1].Annotations = nil }, "no recipient"},
		// What a manifest says.
		{"digests", target, func(m *ocispec.Manifest) {
			m.Layers[0].Digest, m.Layers[1].Digest = m.Layers[1].Digest, m.Layers[0].Digest
		}, tampered},
		{"digest of another image's layer", target, func(m *ocispec.Manifest) { m.Layers[0].Digest = forB.Layers[0].Digest }, tampered},
		{"no such digest", target, func(m *ocispec.Manifest) { m.Layers[0].Digest = digest.FromString("x") }, "not found"},
		{"larger", target, func(m *ocispec.Manifest) { m.Layers[0].Size++ }, "the manifest says 8"},
		{"smaller", target, func(m *ocispec.Manifest) { m.Layers[0].Size-- }, "the manifest says 6"},
		{"negative size", target, func(m *ocispec.Manifest) { m.Layers[0].Size = -1 }, "-1"},
		{"absurd size", target, func(m *ocispec.Manifest) { m.Layers[0].Size = 1<<63 - 1 }, "9223372036854775807"},
		// The layers are whole; which they are, and what they are compressed with,
		// the diff IDs of the configuration say, and containerd checks those.
		{"order", target, func(m *ocispec.Manifest) { m.Layers[0], m.Layers[1] = m.Layers[1], m.Layers[0] }, ""},
		{"type of compression", target, func(m *ocispec.Manifest) { m.Layers[0].MediaType = ocispec.MediaTypeImageLayerGzip + "+encrypted" }, ""},
		{"another type", target, func(m *ocispec.Manifest) { m.Layers[0].MediaType = "application/vnd.example.layer+encrypted" }, ""},
		{"a layer twice", target, func(m *ocispec.Manifest) { m.Layers[1] = m.Layers[0] }, ""},
	} {
		changed := s.edited(test.target, test.change)
		for _, d := range plain {
			if err := s.Delete(s.ctx, d); err != nil && !strings.Contains(err.Error(), "not found") {
				t.Fatal(err)
			}
		}
		before := s.blobs()
		out, err := Decrypt(s.ctx, s, changed, kekOnly, Options{})
		if test.want != "" {
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%s: %v, want %q", test.name, err, test.want)
			}
			if test.want == tampered && !errors.Is(err, processor.ErrTampered) {
				t.Errorf("%s: %v is not ErrTampered", test.name, err)
			}
			// The other layer may have been whole.
			if n := s.blobs() - before; n > 1 {
				t.Errorf("%s: it left %d blobs", test.name, n)
			}
			s.noIngests()
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		for i, l := range s.parsed(out.Target).Layers {
			if text := s.get(l); plain[text] != l.Digest {
				t.Errorf("%s: layer %d is %q", test.name, i, text)
			}
		}
	}
	// What is not known to be an encrypted layer is none, and stays.
	const other = "application/vnd.example.layer+encrypted+encrypted"
	out, err := Decrypt(s.ctx, s, s.edited(target, func(m *ocispec.Manifest) { m.Layers[0].MediaType = other }), kekOnly, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if l := s.parsed(out.Target).Layers[0]; l.MediaType != other || l.Digest != s.parsed(target).Layers[0].Digest {
		t.Errorf("a layer of another type: %+v", l)
	}
}

// TestAnnotationTampered changes each byte of the annotations of pilot's three
// methods. It is found, or it says the same in other words.
func TestAnnotationTampered(t *testing.T) {
	newKEKs(t, "a")
	for _, provider := range []string{"pilot", "remote", "original"} {
		if provider == "original" {
			fipstest.Refused(t, fipstest.Original)
		}
		plain := []byte("layer a")
		var ciphertext bytes.Buffer
		desc, err := processor.Encrypt(t.Context(), &ciphertext, bytes.NewReader(plain), ocispec.MediaTypeImageLayer, kek(provider, "a"))
		if err != nil {
			t.Fatal(err)
		}
		keys := kekOnly
		if provider == "original" {
			keys = keys.With(&config.DecryptConfig{Parameters: map[string][][]byte{provider: {[]byte("a")}}})
		}
		name := keysPrefix + "provider." + provider
		was, err := base64.StdEncoding.DecodeString(desc.Annotations[name])
		if err != nil {
			t.Fatal(err)
		}
		found, harmless := 0, 0
		try := func(what string, changed []byte) {
			t.Helper()
			desc.Annotations[name] = base64.StdEncoding.EncodeToString(changed)
			var out bytes.Buffer
			err := processor.Decrypt(t.Context(), &out, bytes.NewReader(ciphertext.Bytes()), desc, keys)
			switch {
			case err != nil && out.Len() == 0:
				found++
			case err == nil && bytes.Equal(out.Bytes(), plain):
				harmless++
			default:
				t.Errorf("%s: %s: %q, %v", provider, what, out.Bytes(), err)
			}
		}
		for i := range was {
			for _, bit := range []byte{1, 0x20} {
				c := bytes.Clone(was)
				c[i] ^= bit
				try(fmt.Sprintf("byte %d ^ %#x", i, bit), c)
			}
			try(fmt.Sprintf("cut to %d", i), was[:i])
		}
		// The names of its members may be written in capitals, and the last
		// bits of base64 may be wrong where they stand for nothing.
		names := len("methodkekIdkekVersionivwrappedKey")
		t.Logf("%s: %d changes found, %d harmless", provider, found, harmless)
		if harmless > names+4 || found < 2*len(was) {
			t.Errorf("%s: %d changes found, %d harmless", provider, found, harmless)
		}
	}
}

package image

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/wireformat"
	"github.com/ctrlplane/pilot/processor"
)

// TestRewrapTampered has somebody who can write to the registry change recipients.
func TestRewrapTampered(t *testing.T) {
	keys := newKEKs(t, "a", "mallory")
	s := newStore(t)
	target, other := s.encrypted(kek("pilot", "a"), s.ec), s.encrypted(kek("pilot", "a"))
	rotate(t, keys, "a")
	const pilot = keysPrefix + "provider.pilot"
	replaced := func(old, new string) func(m *ocispec.Manifest) {
		return func(m *ocispec.Manifest) {
			for _, l := range m.Layers {
				b, err := base64.StdEncoding.DecodeString(l.Annotations[pilot])
				if err != nil {
					t.Fatal(err)
				}
				l.Annotations[pilot] = base64.StdEncoding.EncodeToString(bytes.Replace(b, []byte(old), []byte(new), 1))
			}
		}
	}
	var foreign ocispec.Manifest
	if err := json.Unmarshal([]byte(s.get(other)), &foreign); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		change func(m *ocispec.Manifest)
		want   string
	}{
		"another KEK's name": {replaced(`"a"`, `"mallory"`), "provider:pilot:mallory@1 can't be wrapped anew"},
		"another version":    {replaced(`"kekVersion":1`, `"kekVersion":2`), "does not unwrap"},
		"another layer's": {func(m *ocispec.Manifest) {
			m.Layers[0].Annotations[pilot] += "," + foreign.Layers[1].Annotations[pilot]
		}, "has a different layer key than the other recipients"},
		"one more":             {func(m *ocispec.Manifest) { m.Layers[1].Annotations[pilot] += "," + fake("mallory") }, "provider:pilot:mallory@1 can't be wrapped anew"},
		"a member's name":      {replaced(`"kekId"`, `"kekID2"`), "provider:pilot is damaged"},
		"not JSON":             {replaced(`{`, ``), "provider:pilot is damaged"},
		"not base64":           {func(m *ocispec.Manifest) { m.Layers[0].Annotations[pilot] = "!" }, "provider:pilot is damaged"},
		"a later method":       {replaced(`A256GCMKW`, `A256GCMKW2`), "not known to this version of pilot"},
		"no public options":    {func(m *ocispec.Manifest) { delete(m.Layers[0].Annotations, processor.AnnotationPrefix+"pubopts") }, "pubopts is missing"},
		"no recipients":        {func(m *ocispec.Manifest) { m.Layers[0].Annotations = nil }, "it has no recipients"},
		"a damaged annotation": {func(m *ocispec.Manifest) { m.Layers[1].Annotations[pilot] = fake("a") }, "provider:pilot:a@1 can't be wrapped anew"},
	} {
		changed := s.edited(target, test.change)
		before := s.blobs()
		out, err := Rewrap(s.ctx, s, changed, Rewrapping{Keys: s.dc}, Options{})
		if err == nil || !strings.Contains(err.Error(), test.want) || s.blobs() != before {
			t.Errorf("%s: %+v, %v, want %q", name, out, err, test.want)
		}
	}
	damaged := s.edited(target, func(m *ocispec.Manifest) {
		for _, l := range m.Layers {
			l.Annotations[pilot] = "!"
		}
	})
	pilots, err := ParseRecipient("provider:pilot")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := Rewrap(s.ctx, s, damaged, Rewrapping{Keys: s.dc, Remove: []Recipient{pilots}, Add: kek("pilot", "a").Parameters}, Options{}); err != nil || s.recipients(out.Target) != "jwe, pilot:a@2" {
		t.Errorf("in place of damaged ones: %+v, %v", out, err)
	}
	// Another key provider's are its own.
	another := s.edited(target, func(m *ocispec.Manifest) {
		for _, l := range m.Layers {
			l.Annotations[keysPrefix+"provider.kms"] = "c29tZXRoaW5n"
		}
	})
	if out, err := Rewrap(s.ctx, s, another, Rewrapping{Keys: kekOnly}, Options{}); err != nil || s.recipients(out.Target) != "jwe, kms, pilot:a@2" {
		t.Errorf("with another key provider's: %+v, %v: %s", out, err, s.recipients(out.Target))
	}
	// Nobody is asked to wrap for a KEK that stays.
	more := s.edited(target, func(m *ocispec.Manifest) {
		for _, l := range m.Layers {
			l.Annotations[pilot] += "," + fake("mallory")
		}
	})
	out, err := Rewrap(s.ctx, s, more, Rewrapping{Keys: kekOnly, From: "a", To: "a"}, Options{})
	if err != nil || s.recipients(out.Target) != "jwe, pilot:a@2, pilot:mallory@1" || strings.Count(s.get(out.Target), fake("mallory")) != 2 {
		t.Errorf("one KEK alone: %+v, %v", out, err)
	}
	s.noIngests()
}

// fake is a value that is wrapped with no KEK.
func fake(id string) string {
	b, err := json.Marshal(wireformat.Annotation{Method: "A256GCMKW", KEKID: id, KEKVersion: 1, IV: make([]byte, 12), WrappedKey: make([]byte, 50)})
	if err != nil {
		panic(err)
	}
	return base64.StdEncoding.EncodeToString(b)
}

func TestParseRecipient(t *testing.T) {
	for text, want := range map[string]Recipient{
		"jwe": {Scheme: "jwe"}, "pgp": {Scheme: "pgp"}, "pkcs7": {Scheme: "pkcs7"}, "pkcs11": {Scheme: "pkcs11"},
		"provider:other": {Scheme: "provider.other"}, "provider:pilot:a": {Scheme: "provider.pilot", KEK: "a"}, "provider:pilot:a:b": {Scheme: "provider.pilot", KEK: "a:b"},
	} {
		got, err := ParseRecipient(text)
		if err != nil || got != want || got.String() != text {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	for text, want := range map[string]string{
		"": "is not the name of recipients", "jwe:key.pem": "jwe alone stands for all of them", "provider": "use provider:NAME:KEK", "provider:": "use", "provider::a": "use", "provider:pilot:": "use", "team-a": "use",
	} {
		if _, err := ParseRecipient(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

func FuzzValues(f *testing.F) {
	f.Add(fake("a") + "," + fake("b"))
	f.Add("WyB7fSwge30gXQ==,,x")
	f.Fuzz(func(t *testing.T, annotation string) {
		l := &layerRewrap{}
		all := values("provider.pilot", annotation)
		if same := l.join(all, nil); same != annotation {
			t.Errorf("%q became %q", annotation, same)
		}
		for _, v := range all {
			if v.keys[0].json == nil {
				continue
			}
			again, err := pilots("provider.pilot", newValue(v.keys))
			if err != nil || len(again) != len(v.keys) {
				t.Fatalf("%q became %v, %v", v.text, again, err)
			}
			for i, k := range v.keys {
				if again[i].Recipient != k.Recipient {
					t.Errorf("%v became %v", k, again[i])
				}
			}
		}
	})
}

func TestRecipientsNameWhatAnnotationsSay(t *testing.T) {
	newKEKs(t, "a", "b")
	s := newStore(t)
	ring := pgpRecipient(t, "one@example.com")
	layer := s.parsed(s.encrypted(s.ec, kek("pilot", "a", "b"), kek("original", "a"), processor.Recipients{Parameters: ring.ec})).Layers[0]
	layer.Annotations[keysPrefix+"provider.other"] = "eA==,eQ=="
	layer.Annotations[keysPrefix+"provider.pilot"] += ",damaged"
	layer.Annotations[keysPrefix+"none"] = ""
	var got []string
	for _, r := range Recipients(layer) {
		if r.Original {
			r.Scheme += " original"
		}
		if strings.HasPrefix(r.KeyID, "0x") {
			r.Scheme += " key"
		}
		got = append(got, r.String())
	}
	want := "jwe, pgp key, provider:original original, provider:other, provider:other, provider:pilot:a@1, provider:pilot:b@1, provider:pilot"
	if text := strings.Join(got, ", "); text != want {
		t.Errorf("got  %s\nwant %s", text, want)
	}
	if list := Recipients(ocispec.Descriptor{}); len(list) > 0 {
		t.Errorf("a plain layer has %v", list)
	}
}

package image

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/jsonedit"
	"github.com/ctrlplane/pilot/processor"
)

// manifest writes a manifest with these layers, as JSON.
func (s *store) manifest(mediaType, layers, more string) ocispec.Descriptor {
	s.t.Helper()
	conf := s.put(ocispec.MediaTypeImageConfig, `{"architecture":"amd64","os":"linux"}`)
	configType := conf.MediaType
	if mediaType == dockerManifest {
		configType = dockerConfig
	}
	return s.put(mediaType, `{"schemaVersion":2,"mediaType":"`+mediaType+`","config":{"mediaType":"`+configType+`",`+ref(conf)+`},"layers":[`+layers+`]`+more+`}`)
}

func entry(d ocispec.Descriptor) string { return `{"mediaType":"` + d.MediaType + `",` + ref(d) + `}` }

// TestUnusualSpellingsComeBack encrypts and decrypts what is written in other ways than Go does.
func TestUnusualSpellingsComeBack(t *testing.T) {
	s := newStore(t)
	a, empty := s.put(ocispec.MediaTypeImageLayerGzip, "layer a"), s.put(ocispec.MediaTypeImageLayer, "")
	layer := func(mediaType, more string) string { return `{"mediaType":"` + mediaType + `",` + ref(a) + more + `}` }
	plain := s.manifest(ociManifest, entry(a), "")
	docker := s.manifest(dockerManifest, layer(dockerGzip, ""), "")
	absent := func(mediaType string) string {
		return entry(ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromString("absent " + mediaType), Size: 9})
	}
	for name, target := range map[string]ocispec.Descriptor{
		// As .NET writes JSON.
		"u002B":                s.manifest(ociManifest, layer(`application/vnd.oci.image.layer.v1.tar\u002Bgzip`, ""), ""),
		"escaped slash":        s.manifest(ociManifest, layer(`application\/vnd.oci.image.layer.v1.tar+gzip`, ""), ""),
		"escaped digest":       s.manifest(ociManifest, strings.Replace(entry(a), "sha256:", `sha256\u003a`, 1), ""),
		"docker u002B":         s.manifest(dockerManifest, layer(strings.ReplaceAll(dockerGzip, ".", `\u002E`), ""), ""),
		"docker list u002B":    s.put(dockerList, `{"mediaType":"`+strings.ReplaceAll(dockerList, "+", `\u002b`)+`","manifests":[`+strings.Replace(entry(docker), "+", `\u002B`, 1)+`]}`),
		"capitals":             s.manifest(ociManifest, layer(a.MediaType, `,"annotations":{"Size":"x","DIGEST":"y"}`), `,"annotations":{"Config":"x"}`),
		"stale annotation":     s.manifest(ociManifest, layer(a.MediaType, `,"annotations":{"a":"b", "org.opencontainers.image.enc.keys.pgp" : "AAAA","c":"d"}`), ""),
		"only stale":           s.manifest(ociManifest, layer(a.MediaType, `,"annotations":{"org.opencontainers.image.enc.keys.pgp":"AAAA"}`), ""),
		"stale on manifest":    s.manifest(dockerManifest, layer(dockerGzip, ""), `,"annotations":{"org.opencontainers.image.enc.foo":"x"}`),
		"urls":                 s.manifest(ociManifest, layer(a.MediaType, `,"urls" : [ "https://example.com/<a>" ],"x":1`), ""),
		"null and empty":       s.manifest(dockerManifest, layer(dockerGzip, `,"annotations": null`)+","+layer(dockerGzip, `,"annotations":{ 	 }`), `,"annotations": {  }`),
		"null on manifest":     s.manifest(dockerManifest, layer(dockerGzip, ""), `,"annotations":null`),
		"no bytes":             s.manifest(ociManifest, entry(empty), ""),
		"twice":                s.manifest(ociManifest, entry(a)+","+entry(a), ""),
		"twice in index":       s.put(ociIndex, `{"manifests":[`+entry(plain)+`,`+entry(plain)+`]}`),
		"absent index":         s.put(ociIndex, `{"manifests":[`+entry(plain)+`,`+absent(ociIndex)+`]}`),
		"absent OCI in list":   s.put(dockerList, `{"mediaType":"`+dockerList+`","manifests":[`+entry(docker)+`,`+absent(ociManifest)+`]}`),
		"absent in list":       s.put(dockerList, `{"mediaType":"`+dockerList+`","manifests":[`+entry(docker)+`,`+absent(dockerManifest)+`]}`),
		"absent layer in list": s.put(dockerList, `{"mediaType":"`+dockerList+`","manifests":[`+entry(docker)+`,`+entry(s.manifest(ociManifest, absent(a.MediaType), ""))+`]}`),
	} {
		encrypted, err := Encrypt(s.ctx, s, target, s.ec, Options{})
		if err != nil {
			t.Errorf("%s: encrypt: %v", name, err)
			continue
		}
		doc := s.get(encrypted.Target)
		if strings.Contains(doc, `:"AAAA"`) || strings.Contains(doc, `: "AAAA"`) || strings.Contains(doc, `"urls" : [ "`) {
			t.Errorf("%s: encrypted to %s", name, doc)
		}
		decrypted, err := Decrypt(s.ctx, s, encrypted.Target, s.dc, Options{})
		if err != nil {
			t.Errorf("%s: decrypt: %v", name, err)
			continue
		}
		if got := decrypted.Target; got.Digest != target.Digest || got.MediaType != target.MediaType || got.Size != target.Size {
			t.Errorf("%s: came back as %s\n%s\nwas\n%s\nencrypted\n%s", name, got.MediaType, s.get(got), s.get(target), doc)
		}
		s.noIngests()
	}
}

// TestImageComesBackInSteps encrypts and decrypts layer by layer, back and forth.
func TestImageComesBackInSteps(t *testing.T) {
	s := newStore(t)
	a, b := s.put(dockerGzip, "layer a"), s.put(dockerGzip, "layer b")
	first := strings.TrimSuffix(entry(a), "}") + `,"annotations":null}`
	for _, mediaType := range []string{ociManifest, dockerManifest} {
		layers := first + "," + entry(b)
		if mediaType == ociManifest {
			layers = strings.ReplaceAll(layers, dockerGzip, ocispec.MediaTypeImageLayerGzip)
		}
		target := s.manifest(mediaType, layers, "")
		result := Result{Target: target}
		for _, step := range []struct {
			encrypt bool
			layers  []int
		}{{true, nil}, {false, []int{0}}, {true, []int{0}}, {false, []int{1}}, {true, nil}, {false, []int{0}}, {false, []int{-1}}} {
			var err error
			if step.encrypt {
				ec := processor.Recipients{Keys: s.dc, Parameters: s.ec.Parameters}
				result, err = Encrypt(s.ctx, s, result.Target, ec, Options{Layers: step.layers})
			} else {
				result, err = Decrypt(s.ctx, s, result.Target, s.dc, Options{Layers: step.layers})
			}
			if err != nil {
				t.Fatalf("%+v: %v", step, err)
			}
		}
		if result.Target.Digest != target.Digest {
			t.Errorf("came back as\n%s\nwas\n%s", s.get(result.Target), s.get(target))
		}
	}
}

// TestNamedDigest has the author of an image name the digest of something else
// as that of its plain layer.
func TestNamedDigest(t *testing.T) {
	s := newStore(t)
	s.put(ocispec.MediaTypeImageLayer, "somebody's secret")
	key := processor.NewLayerKey(digest.FromString("somebody's secret"))
	annotations, err := key.Wrap(s.ctx, s.ec, nil)
	if err != nil {
		t.Fatal(err)
	}
	annotations["org.opencontainers.image.enc.pubopts"] = "eyJjaXBoZXIiOiJBRVNfMjU2X0NUUl9ITUFDX1NIQTI1NiIsImhtYWMiOiJBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBPSIsImNpcGhlcm9wdGlvbnMiOnt9fQ=="
	text, err := json.Marshal(annotations)
	if err != nil {
		t.Fatal(err)
	}
	junk := s.put(ocispec.MediaTypeImageLayer+"+encrypted", "0123456789abcdefg")
	target := s.manifest(ociManifest, strings.TrimSuffix(entry(junk), "}")+`,"annotations":`+string(text)+`}`, "")
	if result, err := Decrypt(s.ctx, s, target, s.dc, Options{}); err == nil {
		t.Errorf("junk was decrypted to %s", s.get(result.Target))
	}
}

func TestPartlyPresentImages(t *testing.T) {
	s := newStore(t)
	a := s.put(ocispec.MediaTypeImageLayer, "layer a")
	here := s.manifest(ociManifest, entry(a), "")
	index := s.put(ociIndex, `{"manifests":[`+entry(here)+`,{"mediaType":"`+ociManifest+`","digest":"`+digest.FromString("x").String()+`","size":3,"platform":{"os":"linux","architecture":"s390x"}}]}`)
	if result, err := Decrypt(s.ctx, s, index, s.dc, Options{}); err != nil || result.Layers != 0 || result.Target.Digest != index.Digest {
		t.Errorf("a plain image, to decrypt: %+v, %v", result, err)
	}
	absent := s.put(ociIndex, `{"manifests":[{"mediaType":"`+ociManifest+`","digest":"`+digest.FromString("x").String()+`","size":3}]}`)
	if _, err := Encrypt(s.ctx, s, absent, s.ec, Options{}); err == nil || !strings.Contains(err.Error(), "no layers of this image are here") {
		t.Errorf("nothing is here: %v", err)
	}
	s390x := Options{Platforms: []ocispec.Platform{{OS: "linux", Architecture: "s390x"}}}
	if _, err := Layers(s.ctx, s, index, s390x); err != nil {
		t.Errorf("layers of a platform that is not here: %v", err)
	}
	foreign := s.manifest(dockerManifest, `{"mediaType":"`+dockerForeign+`","digest":"`+digest.FromString("f").String()+`","size":3},{"mediaType":"`+dockerGzip+`",`+ref(a)+`}`, "")
	if result, err := Encrypt(s.ctx, s, foreign, s.ec, Options{Layers: []int{0}, AllowPlain: true}); err != nil || result.Layers != 0 {
		t.Errorf("a foreign layer: %+v, %v", result, err)
	}
}

// noContent has no blob.
func noContent(ocispec.Descriptor) ([]byte, error) { return nil, errors.New("not here") }

func FuzzRestore(f *testing.F) {
	f.Add(`{"annotations":{"org.opencontainers.image.enc.pilot.restore":"{\"removed\":\"[{\\\"index\\\":1,\\\"before\\\":\\\",{}\\\"}]\"}"},"layers":[{}]}`)
	f.Add(`{"annotations":{"org.opencontainers.image.enc.pilot.restore":"{\"/mediaType\":\"` + dockerManifest + `\"}"},"layers":[]}`)
	f.Fuzz(func(t *testing.T, doc string) {
		notes, err := restoreOf([]byte(doc))
		if err != nil || notes == nil {
			return
		}
		out, _, err := notes.apply([]byte(doc), ociManifest, "layers", noContent)
		if err == nil && !json.Valid(out) {
			t.Fatalf("%q became %q", doc, out)
		}
	})
}

// FuzzUndo edits a manifest as encrypting it does, and back.
func FuzzUndo(f *testing.F) {
	f.Add(`{"mediaType":"` + dockerManifest + `","layers":[{"mediaType":"` + dockerGzip + `","digest":"sha256:aa","size":1,"annotations":{ }}],"annotations":null}`)
	f.Add(`{"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:aa","annotations":{"a":"b", "org.opencontainers.image.enc.keys.jwe" : "x"}}]}`)
	f.Add(`{"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:aa","urls":["https://example.com/x"],"annotations":{"a":"b"}}, {}],"config":{"mediaType":"` + dockerConfig + `"}}`)
	f.Fuzz(func(t *testing.T, doc string) {
		var was, is ocispec.Manifest
		if !utf8.ValidString(doc) || strings.Contains(doc, "restore") || json.Unmarshal([]byte(doc), &was) != nil {
			return
		}
		to := &edit{list: "layers", changes: map[int]change{}, fresh: true}
		for i, l := range was.Layers {
			if mediaType, ok := processor.EncryptedMediaType(l.MediaType); ok && l.Digest != "" {
				to.changes[i] = change{desc: ocispec.Descriptor{MediaType: mediaType, Digest: "sha256:bb", Size: l.Size}, sealKey: []byte("a key that seals"), annotations: map[string]string{
					processor.AnnotationPrefix + "pubopts": fmt.Sprint(i), processor.AnnotationPrefix + "keys.jwe": "x",
				}}
			} else if processor.IsEncrypted(l.MediaType) {
				return
			}
		}
		encrypted, mediaType, err := to.apply([]byte(doc), ociManifest)
		if err != nil {
			return
		}
		if err := json.Unmarshal(encrypted, &is); err != nil {
			t.Fatalf("%q became %q: %v", doc, encrypted, err)
		}
		back := &edit{list: "layers", changes: map[int]change{}, mode: decrypting, done: true}
		for i, l := range is.Layers {
			if mediaType, ok := processor.PlainMediaType(l.MediaType); ok {
				back.changes[i] = change{desc: ocispec.Descriptor{MediaType: mediaType, Digest: was.Layers[i].Digest, Size: l.Size}, sealKey: []byte("a key that seals")}
			}
		}
		decrypted, _, err := back.apply(encrypted, mediaType)
		if err != nil || string(decrypted) != doc {
			t.Fatalf("%q became\n%q and that\n%q, %v", doc, encrypted, decrypted, err)
		}
	})
}

// TestHostileRestore has the author of an image write the annotation by which
// decrypting puts back what the plain image had.
func TestHostileRestore(t *testing.T) {
	s := newStore(t)
	a := s.put(ocispec.MediaTypeImageLayerGzip, "layer a")
	plain := s.manifest(ociManifest, strings.TrimSuffix(entry(a), "}")+`,"urls":["https://example.com/a"],"annotations":{"a":"b"}}`, `,"annotations":{"c":"d"}`)
	index := s.put(ociIndex, `{"manifests":[`+entry(plain)+`,{"mediaType":"`+ociManifest+`","digest":"`+digest.FromString("x").String()+`","size":3,"platform":{"os":"linux","architecture":"s390x"}}]}`)
	hostile := func(t *testing.T, target ocispec.Descriptor, notes restore) (string, error) {
		t.Helper()
		text, err := json.Marshal(notes)
		if err != nil {
			t.Fatal(err)
		}
		doc := s.get(target)
		annotations, err := jsonedit.Get([]byte(doc), "annotations")
		if err != nil {
			t.Fatal(err)
		}
		changed, err := setAnnotations([]byte(doc), annotations, map[string]string{restoreAnnotation: string(text)})
		if err != nil {
			t.Fatal(err)
		}
		result, err := Decrypt(s.ctx, s, s.put(target.MediaType, string(changed)), s.dc, Options{})
		if err != nil {
			return "", err
		}
		return s.get(result.Target), nil
	}
	encrypted, err := Encrypt(s.ctx, s, plain, s.ec, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for name, notes := range map[string]restore{
		"none":                   {},
		"encrypted type":         {"/layers/0/mediaType": `"application/vnd.oci.image.layer.v1.tar+gzip+encrypted"`},
		"encrypted twice":        {"/layers/0/mediaType": `"application/vnd.oci.image.layer.v1.tar+gzip+encrypted+encrypted"`},
		"another type":           {"/layers/0/mediaType": `"application/vnd.evil"`, "/config/mediaType": `"application/vnd.evil"`, "/mediaType": `"application/vnd.evil"`},
		"file URL":               {"/layers/0/urls": `["file:///etc/shadow"]`},
		"relative URL":           {"/layers/0/urls": `["//evil/x"]`},
		"URL with a user":        {"/layers/0/urls": `["https://user:pass@evil/x"]`},
		"one strange URL":        {"/layers/0/urls": `["https://example.com/a","javascript:x"]`},
		"no list of URLs":        {"/layers/0/urls": `"https://example.com/a"`},
		"encryption annotations": {"/layers/0/annotations": `{"a":"b","org.opencontainers.image.enc.keys.provider.pilot":"eyJ9"}`},
		"doubled annotation":     {"/layers/0/annotations": `{"a":"evil","a":"b"}`},
		"doubled, escaped":       {"/layers/0/annotations": `{"\u0061":"evil","a":"b"}`},
		"on the manifest":        {"/annotations": `{"c":"evil","c":"d"}`},
		"encryption's on it":     {"/annotations": `{"c":"d","org.opencontainers.image.enc.keys.jwe":"x"}`},
		"two values":             {"/layers/0/annotations": `{"a":"b"},"urls":["https://evil/"]`},
		"other members":          {"/layers/0/data": `"ZXZpbA=="`, "/layers/0/size": `1`, "/layers/0/platform": `{"os":"evil"}`, "/schemaVersion": `1`},
		"sealed by a stranger": {
			"/layers/0/annotations": `{"a":"b","org.opencontainers.image.enc.keys.jwe":"x"}`,
			"/layers/0/seal":        base64.StdEncoding.EncodeToString(sealOf([]byte("a key that seals"), []byte(`{"a":"b","org.opencontainers.image.enc.keys.jwe":"x"}`))),
		},
		"not sealed":     {"/layers/0/annotations": `{"a":"b","org.opencontainers.image.enc.keys.jwe":"x"}`, "/layers/0/seal": ""},
		"another digest": {"/layers/0/digest": `"` + digest.FromString("evil").String() + `"`},
	} {
		t.Run(name, func(t *testing.T) {
			doc, err := hostile(t, encrypted.Target, notes)
			if err != nil {
				t.Fatal(err)
			}
			// What does not fit is as if it was not there.
			want := strings.Replace(s.get(plain), `["https://example.com/a"]`, `[]`, 1)
			if doc != want {
				t.Errorf("came back as\n%s\nwant\n%s", doc, want)
			}
		})
	}
	kept, err := Encrypt(s.ctx, s, index, s.ec, Options{AllowPlain: true})
	if err != nil {
		t.Fatal(err)
	}
	element := func(more string) string {
		return `{"mediaType":"` + ociManifest + `","digest":"` + digest.FromString("y").String() + `","size":3` + more + `}`
	}
	for name, test := range map[string]struct {
		before string
		good   bool
	}{
		"good":              {"," + element(""), true},
		"strange URL":       {"," + element(`,"urls":["file:///x"]`), false},
		"annotations":       {"," + element(`,"annotations":{"org.opencontainers.image.enc.keys.jwe":"x"}`), false},
		"encrypted type":    {"," + strings.Replace(element(""), "json", "json+encrypted", 1), false},
		"doubled key":       {"," + element(`,"size":3`), false},
		"doubled below":     {"," + element(`,"platform":{"os":"linux","os":"evil","architecture":"x"}`), false},
		"capitals":          {"," + element(`,"URLs":["https://evil/"]`), false},
		"two elements":      {"," + element("") + "," + element(""), false},
		"something between": {`,"x",` + element(""), false},
	} {
		t.Run("left out: "+name, func(t *testing.T) {
			list, err := json.Marshal([]removed{{Index: 1, Before: test.before}})
			if err != nil {
				t.Fatal(err)
			}
			if doc, err := hostile(t, kept.Target, restore{removedKey: string(list)}); (err == nil) != test.good || err != nil && !errors.Is(err, errRemoved) {
				t.Errorf("%s, %v", doc, err)
			}
		})
	}
}

// TestURLsThatCannotComeBackAreRefused encrypts a layer with a URL that would not come back.
func TestURLsThatCannotComeBackAreRefused(t *testing.T) {
	s := newStore(t)
	a := s.put(ocispec.MediaTypeImageLayerGzip, "layer a")
	target := s.manifest(ociManifest, strings.TrimSuffix(entry(a), "}")+`,"urls":["ftp://example.com/a"]}`, "")
	if _, err := Encrypt(s.ctx, s, target, s.ec, Options{}); err == nil || !strings.Contains(err.Error(), "ftp://example.com/a") {
		t.Errorf("error %v", err)
	}
}

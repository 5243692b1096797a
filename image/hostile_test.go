package image

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/jsonedit"
)

// TestDisguisedDocumentsAreRefusedOrNamed encrypts images with a manifest that not all readers take for the same,
// beside an ordinary one. What it refers to is refused or named.
func TestDisguisedDocumentsAreRefusedOrNamed(t *testing.T) {
	s := newStore(t)
	secret := s.put(ocispec.MediaTypeImageLayer, "secret")
	ordinary := s.manifest(ociManifest, entry(s.put(ocispec.MediaTypeImageLayer, "layer a")), "")
	conf := entry(s.put(ocispec.MediaTypeImageConfig, `{"architecture":"amd64","os":"linux"}`))
	listed := s.put(ociManifest, `{"schemaVersion":2,"annotations":{"secret":"of a layer"}}`)
	for name, test := range map[string]struct {
		mediaType, doc string
		err            string // or else it is named
	}{
		"layers twice":           {ociManifest, `{"config":` + conf + `,"layers":[` + entry(secret) + `],"layers":[]}`, "duplicate key"},
		"layers in two cases":    {ociManifest, `{"config":` + conf + `,"layers":[` + entry(secret) + `],"Layers":[]}`, "can be taken for"},
		"layers in a long s":     {ociManifest, `{"config":` + conf + `,"layers":[` + entry(secret) + `],"layerſ":[]}`, "can be taken for"},
		"digest in two cases":    {ociIndex, `{"manifests":[{"mediaType":"x/y",` + ref(secret) + `,"Digest":"` + ordinary.Digest.String() + `"}]}`, "can be taken for"},
		"a manifest as an index": {ociIndex, `{"config":` + conf + `,"layers":[` + entry(secret) + `]}`, ""},
		"an index as a manifest": {ociManifest, `{"manifests":[` + entry(s.manifest(ociManifest, entry(secret), "")) + `]}`, ""},
		"an artifact manifest":   {ociManifest, `{"mediaType":"application/vnd.oci.artifact.manifest.v1+json","blobs":[` + entry(secret) + `]}`, ""},
		"a layer, too":           {ociManifest, s.get(s.manifest(ociManifest, entry(listed), "")), ""},
	} {
		disguised := s.put(test.mediaType, test.doc)
		target := s.put(ociIndex, `{"manifests":[`+entry(ordinary)+","+entry(disguised)+","+entry(listed)+`]}`)
		if name != "a layer, too" {
			target = s.put(ociIndex, `{"manifests":[`+entry(ordinary)+","+entry(disguised)+`]}`)
		}
		before := s.blobs()
		out, err := Encrypt(s.ctx, s, target, s.ec, Options{})
		refused := new(PlainError)
		if err == nil || test.err != "" && !strings.Contains(err.Error(), test.err) || test.err == "" && !errors.As(err, &refused) || s.blobs() != before {
			t.Errorf("%s: encrypted to %s, %v", name, s.get(out.Target), err)
		}
		readable, err := Inspect(s.ctx, s, target, Options{})
		if named := len(NotEncrypted(readable)) > 1; err == nil && !named || err != nil && test.err == "" {
			t.Errorf("%s: readable: %v, %v", name, readable, err)
		}
		if test.err != "" {
			continue
		}
		out, err = Encrypt(s.ctx, s, target, s.ec, Options{AllowPlain: true})
		if err != nil || len(NotEncrypted(out.Plain)) == 0 {
			t.Errorf("%s: allowed, %v, %v", name, out.Plain, err)
			continue
		}
		if decrypted, err := Decrypt(s.ctx, s, out.Target, s.dc, Options{}); err != nil || decrypted.Target.Digest != target.Digest {
			t.Errorf("%s: came back as %s, %v", name, s.get(decrypted.Target), err)
		}
	}
}

// TestNotesOfTooManyEntriesAreRefused decrypts an index that says that very much was left out of it.
func TestNotesOfTooManyEntriesAreRefused(t *testing.T) {
	s := newStore(t)
	encrypted := s.encrypted(s.ec)
	large := `{"mediaType":"x/y",` + ref(encrypted) + `,"annotations":{"x":"` + strings.Repeat("x", 1<<20) + `"}}`
	for count, want := range map[int]string{maxDocuments: "", maxDocuments + 1: "do not fit", 50_000: "do not fit"} {
		list := make([]removed, count)
		about := 0
		for i := range list {
			list[i] = removed{Index: 1, Before: `, {"i":` + strconv.Itoa(i) + `}`, About: &about}
		}
		text, err := json.Marshal(list)
		if err != nil {
			t.Fatal(err)
		}
		note, err := json.Marshal(map[string]string{removedKey: string(text)})
		if err != nil {
			t.Fatal(err)
		}
		target := s.put(ociIndex, `{"manifests":[`+large+`,`+entry(encrypted)+`],"annotations":{"`+restoreAnnotation+`":`+string(jsonedit.Quote(string(note)))+`}}`)
		out, err := Decrypt(s.ctx, s, target, s.dc, Options{})
		if want != "" {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%d: %v", count, err)
			}
			continue
		}
		var index struct{ Manifests []struct{ I *int } }
		if err != nil || json.Unmarshal([]byte(s.get(out.Target)), &index) != nil || len(index.Manifests) != count+2 {
			t.Fatalf("%d: %d, %v", count, len(index.Manifests), err)
		}
		for i := range count {
			if got := index.Manifests[i+1].I; got == nil || *got != i {
				t.Fatalf("entry %d is %v", i+1, got)
			}
		}
	}
}

// TestNoLayerIsPutIntoAManifest has no layer put into a manifest: none is ever left out.
func TestNoLayerIsPutIntoAManifest(t *testing.T) {
	s := newStore(t)
	target := s.encrypted(s.ec)
	note := string(jsonedit.Quote(`{"` + removedKey + `":"[{\"index\":0,\"after\":\"{},\"}]"}`))
	doc := strings.Replace(s.get(target), `"layers":[`, `"annotations":{"`+restoreAnnotation+`":`+note+`},"layers":[`, 1)
	out, err := Decrypt(s.ctx, s, s.put(ociManifest, doc), s.dc, Options{})
	if err != nil {
		t.Fatal(err)
	}
	var was, is ocispec.Manifest
	if err := errors.Join(json.Unmarshal([]byte(doc), &was), json.Unmarshal([]byte(s.get(out.Target)), &is)); err != nil || len(is.Layers) != len(was.Layers) {
		t.Errorf("%s, %v", s.get(out.Target), err)
	}
}

// TestPlainIsPrintable has an image name blobs by digests that a terminal would obey.
func TestPlainIsPrintable(t *testing.T) {
	s := newStore(t)
	layer := `{"mediaType":"x/y","digest":"sha256:\u001b]0;x\u0007\u202e","size":1}`
	target := s.put(ociIndex, `{"manifests":[`+entry(s.manifest(ociManifest, layer, ""))+`,`+layer+`]}`)
	plain, err := Inspect(s.ctx, s, target, Options{})
	if err != nil || len(plain) < 3 {
		t.Fatalf("%v, %v", plain, err)
	}
	for _, p := range plain {
		if text := p.String(); strings.ContainsFunc(text, func(r rune) bool { return !strconv.IsPrint(r) }) {
			t.Errorf("%q", text)
		}
	}
}

// TestPlainDataOfEncryptedLayerIsNamed has an encrypted layer whose descriptor still has the plain one.
func TestPlainDataOfEncryptedLayerIsNamed(t *testing.T) {
	s := newStore(t)
	doc := s.get(s.encrypted(s.ec))
	data := `"data":"` + base64.StdEncoding.EncodeToString([]byte("layer b")) + `","digest":`
	at := strings.LastIndex(doc, `"digest":`)
	target := s.put(ociManifest, doc[:at]+data+doc[at+len(`"digest":`):])
	readable, err := Inspect(s.ctx, s, target, Options{})
	if list := NotEncrypted(readable); err != nil || len(list) != 1 || list[0].Reason != ReasonData {
		t.Errorf("%v, %v", readable, err)
	}
	s.ec.Keys = s.dc
	out, err := Encrypt(s.ctx, s, target, s.ec, Options{Layers: []int{0}})
	if refused := new(PlainError); !errors.As(err, &refused) || refused.Plain[0].Reason != ReasonData {
		t.Errorf("%+v, %v", out, err)
	}
}

// TestDataPutBackIsBounded decrypts a manifest that says that each of its layers was in it.
func TestDataPutBackIsBounded(t *testing.T) {
	s := newStore(t)
	const count = 20
	layer := s.put(ocispec.MediaTypeImageLayer, strings.Repeat("layer", 200_000)) // 1 MB
	out, err := Encrypt(s.ctx, s, s.manifest(ociManifest, strings.TrimSuffix(strings.Repeat(entry(layer)+",", count), ","), ""), s.ec, Options{})
	if err != nil {
		t.Fatal(err)
	}
	notes := restore{}
	for i := range count {
		notes["/layers/"+strconv.Itoa(i)+"/data"] = "true"
	}
	note, err := json.Marshal(notes)
	if err != nil {
		t.Fatal(err)
	}
	doc := strings.ReplaceAll(s.get(out.Target), `"digest":`, `"data":"","digest":`)
	doc = strings.Replace(doc, `"layers":`, `"annotations":{"`+restoreAnnotation+`":`+string(jsonedit.Quote(string(note)))+`},"layers":`, 1)
	out, err = Decrypt(s.ctx, s, s.put(ociManifest, doc), s.dc, Options{})
	if !errors.Is(err, ErrLimit) {
		t.Errorf("decrypted to %d bytes, %v", out.Target.Size, err)
	}
}

// TestFalseSizesAreRefused has small sizes for a blob that is too large to be held in memory.
func TestFalseSizesAreRefused(t *testing.T) {
	s := newStore(t)
	huge := s.put(ocispec.MediaTypeImageConfig, `{"os":"linux","architecture":"amd64"}`+strings.Repeat(" ", maxManifest))
	huge.Size = 1
	doc := s.get(s.encrypted(s.ec))
	at := strings.Index(doc, `"layers":`)
	target := s.put(ociManifest, `{"config":`+entry(huge)+`,"subject":{"data":"",`+entry(huge)[1:]+`,"annotations":{"`+restoreAnnotation+`":"{\"/subject/data\":\"true\"}"},`+doc[at:])
	layers, err := Layers(s.ctx, s, target, Options{})
	if err != nil || len(layers) == 0 || layers[0].Platform != nil {
		t.Errorf("%+v, %v", layers, err)
	}
	if out, err := Decrypt(s.ctx, s, target, s.dc, Options{}); err == nil || !strings.Contains(err.Error(), "the manifest says 1") {
		t.Errorf("decrypted to %d bytes, %v", out.Target.Size, err)
	}
}

// vanishing is a store that loses a blob once it was asked for it so often.
type vanishing struct {
	content.Store
	blob digest.Digest
	left int
}

func (v *vanishing) Info(ctx context.Context, d digest.Digest) (content.Info, error) {
	if d == v.blob {
		if v.left--; v.left < 0 {
			return content.Info{}, errdefs.ErrNotFound
		}
	}
	return v.Store.Info(ctx, d)
}

// TestVanishingLayerIsEncryptedOrAnError has a foreign layer vanish at any time. It is encrypted, or an error.
func TestVanishingLayerIsEncryptedOrAnError(t *testing.T) {
	s := newStore(t)
	foreign := s.put(dockerForeign, "foreign")
	other := s.put(ocispec.MediaTypeImageLayer, "layer a")
	target := s.manifest(ociManifest, entry(other)+","+entry(foreign), "")
	succeeded := false
	for left := range 10 {
		out, err := Encrypt(s.ctx, &vanishing{s.Store, foreign.Digest, left}, target, s.ec, Options{})
		if err == nil && strings.Contains(s.get(out.Target), foreign.Digest.String()) {
			t.Errorf("the layer stays readable when it vanishes after %d", left)
		}
		succeeded = succeeded || err == nil
	}
	if !succeeded {
		t.Error("it was never encrypted")
	}
}

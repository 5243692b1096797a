package image

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/containers/ocicrypt/config"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/wireformat"
	"github.com/ctrlplane/pilot/processor"
)

// readStore notes which blobs are read.
type readStore struct {
	*store
	mu   sync.Mutex
	read map[digest.Digest]bool
}

func (s *readStore) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.read[desc.Digest] = true
	return s.store.ReaderAt(ctx, desc)
}

// image puts an image of these layers, whose configuration has a diff ID for each.
func (s *store) image(layers ...ocispec.Descriptor) ocispec.Descriptor {
	s.t.Helper()
	ids := make([]digest.Digest, len(layers))
	for i, l := range layers {
		ids[i] = l.Digest
	}
	config, err := json.Marshal(ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: ids}})
	if err != nil {
		s.t.Fatal(err)
	}
	return s.of(ocispec.MediaTypeImageConfig, string(config), layers)
}

// artifact puts an artifact of these layers, which nobody unpacks.
func (s *store) artifact(layers ...ocispec.Descriptor) ocispec.Descriptor {
	s.t.Helper()
	return s.of(ocispec.MediaTypeEmptyJSON, `{}`, layers)
}

func (s *store) of(configType, config string, layers []ocispec.Descriptor) ocispec.Descriptor {
	s.t.Helper()
	doc, err := json.Marshal(ocispec.Manifest{MediaType: ociManifest, Config: s.put(configType, config), Layers: layers})
	if err != nil {
		s.t.Fatal(err)
	}
	return s.put(ociManifest, string(doc))
}

// like has the layers of an encrypted image that is in the same store.
func (s *store) like(target ocispec.Descriptor) *Like {
	s.t.Helper()
	return s.likeLayers(s.layers(target)...)
}

func (s *store) likeLayers(layers ...ocispec.Descriptor) *Like {
	return &Like{Layers: layers, Take: func(ctx context.Context, blob ocispec.Descriptor) error {
		_, err := s.Info(ctx, blob.Digest)
		return err
	}}
}

func (s *store) mustEncrypt(target ocispec.Descriptor, to processor.Recipients, opts Options) Result {
	s.t.Helper()
	to.Keys = s.dc
	result, err := Encrypt(s.ctx, s, target, to, opts)
	if err != nil {
		s.t.Fatal(err)
	}
	return result
}

// mustComeBack checks that decrypting gives an image.
func (s *store) mustComeBack(from Result, plain ocispec.Descriptor) {
	s.t.Helper()
	out, err := Decrypt(s.ctx, s, from.Target, s.dc, Options{})
	if err != nil || out.Target.Digest != plain.Digest {
		s.t.Errorf("it came back as %s and not as %s: %v", out.Target.Digest, plain.Digest, err)
	}
}

// plant makes what an attacker who knows the key may put into an earlier image: a blob of
// what, which is said to be plain and is sealed, and whose key is wrapped for to, with a seal
// for lazy pulling.
func (s *store) plant(plain ocispec.Descriptor, what string, to processor.Recipients) ocispec.Descriptor {
	s.t.Helper()
	key := processor.NewLayerKey(plain.Digest).WithSealed(bytes.Repeat([]byte{7}, 32))
	e, err := processor.NewEncrypter(strings.NewReader(what), key)
	if err != nil {
		s.t.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := io.Copy(&b, e); err != nil {
		s.t.Fatal(err)
	}
	l := s.put(plain.MediaType+"+encrypted", b.String())
	to.Keys = s.dc
	if l.Annotations, err = key.Wrap(s.ctx, to, nil); err != nil {
		s.t.Fatal(err)
	}
	added, err := annotationsOf(key, l.Digest)
	if err != nil {
		s.t.Fatal(err)
	}
	maps.Copy(l.Annotations, added)
	return l
}

const tarType = ocispec.MediaTypeImageLayer

func TestLikeTakesOverWhatDidNotChange(t *testing.T) {
	keks := newKEKs(t, "a")
	s := newStore(t)
	layers := []ocispec.Descriptor{s.put(tarType, "layer 0"), s.put(tarType, "layer 1"), s.put(tarType, "layer 2")}
	v1 := s.mustEncrypt(s.image(layers...), kek("pilot", "a"), Options{})
	if v1.Reused.Layers != 0 {
		t.Errorf("without an earlier image: %+v", v1.Reused)
	}
	was := s.layers(v1.Target)

	layers[1] = s.put(tarType, "layer X")
	plain := s.image(layers...)
	reads := &readStore{store: s, read: map[digest.Digest]bool{}}
	to := kek("pilot", "a")
	v2, err := Encrypt(s.ctx, reads, plain, to, Options{Like: s.like(v1.Target)})
	if err != nil {
		t.Fatal(err)
	}
	is := s.layers(v2.Target)
	for i, same := range []bool{true, false, true} {
		if (is[i].Digest == was[i].Digest) != same {
			t.Errorf("layer %d was %s and is %s", i, was[i].Digest, is[i].Digest)
		}
		if reads.read[layers[i].Digest] == same || reads.read[was[i].Digest] {
			t.Errorf("layer %d: the plain blob was read: %v, the encrypted one %v", i, reads.read[layers[i].Digest], reads.read[was[i].Digest])
		}
	}
	if v2.Layers != 3 || v2.Reused.Layers != 2 || v2.Reused.Bytes != 14 || v2.Reused.Failed != nil {
		t.Errorf("%+v", v2)
	}
	if got := s.recipients(v2.Target); got != "pilot:a@1" {
		t.Errorf("recipients %s", got)
	}
	s.mustComeBack(v2, plain)
	// What was taken over can be taken over again, for others and with other versions of
	// KEKs too.
	more := s.mustEncrypt(v2.Target, s.ec, Options{})
	rotate(t, keks, "a")
	rewrapped, err := Rewrap(s.ctx, s, more.Target, Rewrapping{Keys: s.dc}, Options{})
	if err != nil || s.recipients(rewrapped.Target) != "jwe, pilot:a@2" {
		t.Fatal(err, s.recipients(rewrapped.Target))
	}
	clear(reads.read)
	v3, err := Encrypt(s.ctx, reads, plain, to, Options{Like: s.like(rewrapped.Target)})
	if err != nil || v3.Reused.Layers != 3 || s.recipients(v3.Target) != "pilot:a@2" {
		t.Errorf("the third time: %+v, %v", v3.Reused, err)
	}
	for _, l := range layers {
		if reads.read[l.Digest] {
			t.Errorf("the third time, %s was read", l.Digest)
		}
	}
}

// TestLikeWrapsForTheNewRecipientsAlone takes over the layers of an image for one KEK
// into one for another, and for a public key.
func TestLikeWrapsForTheNewRecipientsAlone(t *testing.T) {
	newKEKs(t, "a", "b")
	s := newStore(t)
	plain := s.image(s.put(tarType, "layer 0"), s.put(tarType, "layer 1"))
	for _, test := range []struct {
		from, to processor.Recipients
		want     string
	}{
		{kek("pilot", "a", "b"), kek("pilot", "b"), "pilot:b@1"},
		{kek("pilot", "a"), kek("pilot", "b"), "pilot:b@1"},
		{kek("original", "a"), kek("pilot", "a"), "pilot:a@1"},
		{kek("remote", "a"), kek("remote", "a"), "remote:a@1"},
		{kek("pilot", "a"), s.ec, "jwe"},
		{s.ec, s.ec, "jwe"},
		{s.ec, kek("pilot", "b"), "pilot:b@1"},
	} {
		keys := s.dc
		if test.from.Parameters["original"] != nil {
			s.dc = s.dc.With(&config.DecryptConfig{Parameters: test.from.Parameters})
		}
		v1 := s.mustEncrypt(plain, test.from, Options{})
		v2 := s.mustEncrypt(plain, test.to, Options{Like: s.like(v1.Target)})
		if v2.Reused.Layers != 2 || s.recipients(v2.Target) != test.want {
			t.Errorf("to %s: %+v, recipients %s", test.want, v2.Reused, s.recipients(v2.Target))
		}
		s.mustComeBack(v2, plain)
		s.dc = keys
	}
}

// TestLikeTakesOverNothingThatWasPlanted has somebody who can write to the registry change
// the earlier image. Whatever is taken over is what was encrypted.
func TestLikeTakesOverNothingThatWasPlanted(t *testing.T) {
	newKEKs(t, "a", "b")
	s := newStore(t)
	s.dc = s.dc.With(&config.DecryptConfig{Parameters: kek("original", "a").Parameters})
	layer := s.put(tarType, "the real layer")
	image, artifact := s.image(layer), s.artifact(layer)
	was := s.layers(s.mustEncrypt(image, kek("pilot", "a"), Options{}).Target)[0]
	other := s.layers(s.mustEncrypt(s.image(s.put(tarType, "the other one.")), kek("pilot", "a"), Options{}).Target)[0]
	changed := func(change func(l *ocispec.Descriptor)) ocispec.Descriptor {
		l := was
		l.Annotations = maps.Clone(was.Annotations)
		change(&l)
		return l
	}
	const pubopts = processor.AnnotationPrefix + "pubopts"
	for name, test := range map[string]struct {
		earlier ocispec.Descriptor
		plain   ocispec.Descriptor
		reused  int
		want    string
	}{
		"as it was":                      {was, image, 1, ""},
		"as it was, in an artifact":      {was, artifact, 1, ""},
		"for a public key":               {s.plant(layer, "an evil layer!", s.ec), image, 0, "tampered with"},
		"with another key provider":      {s.plant(layer, "an evil layer!", kek("remote", "a")), image, 0, "tampered with"},
		"with another KEK":               {s.plant(layer, "an evil layer!", kek("pilot", "b")), image, 0, "tampered with"},
		"in the original's format":       {s.plant(layer, "an evil layer!", kek("original", "a")), image, 0, "tampered with"},
		"with the KEK, in an artifact":   {s.plant(layer, "an evil layer!", kek("pilot", "a")), artifact, 0, "tampered with"},
		"the right one for a public key": {s.plant(layer, "the real layer", s.ec), image, 1, ""},
		"another blob":                   {changed(func(l *ocispec.Descriptor) { l.Digest = other.Digest }), image, 0, "tampered with"},
		"another HMAC":                   {changed(func(l *ocispec.Descriptor) { l.Annotations[pubopts] = other.Annotations[pubopts] }), image, 0, "tampered with"},
		"another blob and its HMAC": {changed(func(l *ocispec.Descriptor) {
			l.Digest, l.Annotations[pubopts] = other.Digest, other.Annotations[pubopts]
			l.Annotations[layerSealAnnotation] = other.Annotations[layerSealAnnotation]
		}), image, 0, "tampered with"},
		"another key":     {changed(func(l *ocispec.Descriptor) { l.Annotations = other.Annotations }), image, 0, ""},
		"no seal":         {changed(func(l *ocispec.Descriptor) { delete(l.Annotations, layerSealAnnotation) }), image, 1, ""},
		"a damaged seal":  {changed(func(l *ocispec.Descriptor) { l.Annotations[layerSealAnnotation] = "?" }), image, 1, ""},
		"no HMAC":         {changed(func(l *ocispec.Descriptor) { delete(l.Annotations, pubopts) }), image, 0, "pubopts is missing"},
		"no such blob":    {changed(func(l *ocispec.Descriptor) { l.Digest = digest.FromString("nothing") }), image, 0, "tampered with"},
		"another size":    {changed(func(l *ocispec.Descriptor) { l.Size++ }), image, 0, ""},
		"not encrypted":   {changed(func(l *ocispec.Descriptor) { l.MediaType = tarType }), image, 0, ""},
		"no recipients":   {changed(func(l *ocispec.Descriptor) { delete(l.Annotations, keysPrefix+"provider.pilot") }), image, 0, ""},
		"no plain digest": {s.plant(ocispec.Descriptor{MediaType: tarType}, "the real layer", kek("pilot", "a")), image, 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			v2 := s.mustEncrypt(test.plain, kek("pilot", "a"), Options{Like: s.likeLayers(test.earlier)})
			if v2.Reused.Layers != test.reused {
				t.Errorf("%+v", v2.Reused)
			}
			if got := v2.Reused.Failed; (test.want == "") != (got == nil) || got != nil && !strings.Contains(got[0].Error(), test.want) {
				t.Errorf("%v, want %q", got, test.want)
			}
			if is := s.layers(v2.Target)[0]; test.reused == 0 && is.Digest == test.earlier.Digest {
				t.Errorf("it is %s", is.Digest)
			}
			s.mustComeBack(v2, test.plain)
		})
	}
}

// TestLikeTrustsNoKMSForWhoWrapped: behind the method copilot may be an RSA key, whose public
// half anybody wraps with.
func TestLikeTrustsNoKMSForWhoWrapped(t *testing.T) {
	wrapped := func(scheme string, list ...wireformat.Annotation) ocispec.Descriptor {
		b, err := json.Marshal(list)
		if err != nil {
			t.Fatal(err)
		}
		return ocispec.Descriptor{Annotations: map[string]string{keysPrefix + scheme: base64.StdEncoding.EncodeToString(b)}}
	}
	e := newEarlier(&Like{}, kek("pilot", "a", "b"))
	key := make([]byte, 50)
	kms := wireformat.Annotation{Method: wireformat.MethodCopilot, KEKID: "a", KEKVersion: 1, WrappedKey: key}
	own := wireformat.Annotation{Method: wireformat.MethodA256GCMKW, KEKID: "b", KEKVersion: 2, IV: make([]byte, wireformat.IVSize), WrappedKey: key}
	other := own
	other.KEKID = "c"
	original := wireformat.Annotation{Method: wireformat.MethodAESGCM, IV: make([]byte, wireformat.OriginalIVSize), WrappedKey: key}
	for name, l := range map[string]ocispec.Descriptor{
		"a KMS's": wrapped("provider.pilot", kms), "another KEK": wrapped("provider.pilot", other), "the original": wrapped("provider.pilot", original),
		"another provider": wrapped("provider.second", own), "no provider": wrapped("pilot", own), "nothing": {},
	} {
		if k := e.own(l); k != nil {
			t.Errorf("%s: %v", name, k)
		}
	}
	if k := e.own(wrapped("provider.pilot", kms, other, own)); k == nil || k.KEK != "b" {
		t.Errorf("the KEK of a recipient: %v", k)
	}
}

// TestLikeTrustsThoseWhoMayUseTheKEK shows what docs/threat-model.md concedes: the key of
// a layer that nodes compare with a diff ID may be anybody's who may wrap with the KEK.
func TestLikeTrustsThoseWhoMayUseTheKEK(t *testing.T) {
	newKEKs(t, "a")
	s := newStore(t)
	layer := s.put(tarType, "the real layer")
	planted := s.plant(layer, "an evil layer!", kek("pilot", "a"))
	v2 := s.mustEncrypt(s.image(layer), kek("pilot", "a"), Options{Like: s.likeLayers(planted)})
	out, err := Decrypt(s.ctx, s, v2.Target, s.dc, Options{})
	if err != nil || v2.Reused.Layers != 1 {
		t.Fatal(v2.Reused, err)
	}
	// The configuration, which a signature covers, has the diff ID of the real layer.
	var m ocispec.Manifest
	var config ocispec.Image
	if err := json.Unmarshal([]byte(s.get(out.Target)), &m); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(s.get(m.Config)), &config); err != nil {
		t.Fatal(err)
	}
	if m.Layers[0].Digest == layer.Digest || config.RootFS.DiffIDs[0] != layer.Digest {
		t.Errorf("layer %s, diff ID %s", m.Layers[0].Digest, config.RootFS.DiffIDs[0])
	}
}

// TestLikeReadsWhatAnArtifactHasToo has an index of an image and an artifact with the same
// layer, which nobody compares with a diff ID in the artifact.
func TestLikeReadsWhatAnArtifactHasToo(t *testing.T) {
	newKEKs(t, "a")
	s := newStore(t)
	layer := s.put(tarType, "the real layer")
	planted := s.plant(layer, "an evil layer!", kek("pilot", "a"))
	right := s.layers(s.mustEncrypt(s.image(layer), kek("pilot", "a"), Options{}).Target)[0]
	for name, index := range map[string]ocispec.Descriptor{
		"image first":    s.indexOf(s.image(layer), s.artifact(layer)),
		"artifact first": s.indexOf(s.artifact(layer), s.image(layer)),
		"in between":     s.indexOf(s.image(layer, s.put(tarType, "2")), s.artifact(layer), s.image(layer)),
	} {
		v2 := s.mustEncrypt(index, kek("pilot", "a"), Options{Like: s.likeLayers(planted)})
		if v2.Reused.Layers != 0 || len(v2.Reused.Failed) != 1 {
			t.Errorf("%s: %+v", name, v2.Reused)
		}
		s.mustComeBack(v2, index)
		if v2 = s.mustEncrypt(index, kek("pilot", "a"), Options{Like: s.likeLayers(right)}); v2.Reused.Layers != 1 {
			t.Errorf("%s: %+v", name, v2.Reused)
		}
		s.mustComeBack(v2, index)
	}
}

func TestLikeEncryptsAnewWhatIsMissing(t *testing.T) {
	newKEKs(t, "a")
	s := newStore(t)
	plain := s.image(s.put(tarType, "layer 0"), s.put(tarType, "layer 1"))
	v1 := s.mustEncrypt(plain, kek("pilot", "a"), Options{})
	was := s.layers(v1.Target)
	if err := s.Delete(s.ctx, was[0].Digest); err != nil {
		t.Fatal(err)
	}
	v2 := s.mustEncrypt(plain, kek("pilot", "a"), Options{Like: s.likeLayers(was...)})
	if v2.Layers != 2 || v2.Reused.Layers != 1 || len(v2.Reused.Failed) != 1 || !errdefs.IsNotFound(v2.Reused.Failed[0]) {
		t.Errorf("%+v", v2)
	}
	if is := s.layers(v2.Target); is[0].Digest == was[0].Digest || is[1].Digest != was[1].Digest {
		t.Errorf("%v", is)
	}
	s.mustComeBack(v2, plain)
	s.noIngests()

	// Keys that do not unwrap: those of somebody else.
	stranger := newRecipients(t).all[0]
	v1 = s.mustEncrypt(plain, encryptConfig([]recipient{stranger}), Options{})
	v2 = s.mustEncrypt(plain, s.ec, Options{Like: s.like(v1.Target)})
	if v2.Reused.Layers != 0 || len(v2.Reused.Failed) == 0 {
		t.Errorf("for somebody else: %+v", v2)
	}
	s.mustComeBack(v2, plain)
}

// TestLikeGivesUp has an earlier image all of whose layers except the last are somebody
// else's, or not what they claim to be.
func TestLikeGivesUp(t *testing.T) {
	newKEKs(t, "a")
	s := newStore(t)
	layer := s.put(tarType, "the real layer")
	plain := s.image(layer)
	right := s.layers(s.mustEncrypt(plain, s.ec, Options{}).Target)[0]
	var wrong []ocispec.Descriptor
	for range maxFailed {
		wrong = append(wrong, s.plant(layer, "an evil layer!", s.ec))
	}
	for n, reused := range map[int]int{maxFailed - 1: 1, maxFailed: 0} {
		// Each three times, as an index of several platforms has them.
		all := slices.Concat(wrong[:n], wrong[:n], wrong[:n], []ocispec.Descriptor{right})
		reads := &reads{Store: s}
		to := s.ec
		to.Keys = s.dc
		v2, err := Encrypt(s.ctx, reads, plain, to, Options{Like: s.likeLayers(all...)})
		if err != nil || v2.Reused.Layers != reused || len(v2.Reused.Failed) != n || reads.n > maxFailed+10 {
			t.Errorf("after %d: %+v, %d reads, %v", n, v2.Reused, reads.n, err)
		}
	}
}

// TestLikeGoesByThePlainDigest takes over a layer that the new image has under another
// media type, in another manifest of an index.
func TestLikeGoesByThePlainDigest(t *testing.T) {
	newKEKs(t, "a")
	s := newStore(t)
	const text = "the same bytes"
	v1 := s.mustEncrypt(s.image(s.put(dockerGzip, text)), kek("pilot", "a"), Options{})
	was := s.layers(v1.Target)[0]
	oci, foreign := s.put(ocispec.MediaTypeImageLayerZstd, text), s.put(dockerForeign, text)
	foreign.URLs = []string{"https://example.com/layer"}
	plain := s.indexOf(s.image(oci), s.image(s.put(tarType, "another layer"), foreign))
	v2 := s.mustEncrypt(plain, kek("pilot", "a"), Options{Like: s.like(v1.Target)})
	var types []string
	for _, l := range s.layers(v2.Target) {
		if l.Digest == was.Digest {
			types = append(types, l.MediaType)
		}
	}
	slices.Sort(types)
	if want := []string{ocispec.MediaTypeImageLayerGzip + "+encrypted", ocispec.MediaTypeImageLayerZstd + "+encrypted"}; !slices.Equal(types, want) {
		t.Errorf("%q, want %q", types, want)
	}
	s.mustComeBack(v2, plain)
}

// TestLikeWrapsNothingThatOthersSealed takes a layer over with the key of which somebody has
// wrapped what they like for lazy pulling.
func TestLikeWrapsNothingThatOthersSealed(t *testing.T) {
	newKEKs(t, "a")
	s := newStore(t)
	plain := s.put(ocispec.MediaTypeImageLayer, "the same layer")
	earlier := s.plant(plain, "the same layer", kek("pilot", "a"))
	result := s.mustEncrypt(s.image(plain), kek("pilot", "a"), Options{Like: s.likeLayers(earlier)})
	if result.Reused.Layers != 1 {
		t.Fatalf("%d layers were taken over", result.Reused.Layers)
	}
	got, err := processor.Unwrap(s.ctx, s.dc, s.layers(result.Target)[0])
	if err != nil || got.Sealed != nil || got.Digest != plain.Digest {
		t.Errorf("the key is wrapped with %x and %s: %v", got.Sealed, got.Digest, err)
	}
}

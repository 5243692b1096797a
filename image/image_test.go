package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	imgcrypt "github.com/containerd/imgcrypt/v2/images/encryption"
	"github.com/containerd/platforms"
	"github.com/containers/ocicrypt/config"
	"github.com/containers/ocicrypt/utils"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/ctrlplane/pilot/processor"
)

// store is containerd's content store, and keys to use on it.
type store struct {
	content.Store
	t       testing.TB
	ctx     context.Context
	ec      processor.Recipients
	dc      processor.Keys
	stopped func() // cancels ctx
}

var testKeys = func() (keys [2][]byte) {
	public, private, err := utils.CreateRSATestKey(2048, nil, true)
	if err != nil {
		panic(err)
	}
	return [2][]byte{public, private}
}()

func newStore(t testing.TB) *store {
	t.Helper()
	fipstest.Refused(t, fipstest.JWE)
	dir := t.TempDir()
	blobs, err := local.NewStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	db, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	ctx, stop := context.WithCancel(namespaces.WithNamespace(t.Context(), "test"))
	t.Cleanup(stop)
	return &store{
		Store: metadata.NewDB(db, blobs, nil).ContentStore(), t: t, ctx: ctx, stopped: stop,
		ec: processor.Recipients{Keys: kekOnly, Parameters: map[string][][]byte{"pubkeys": {testKeys[0]}}},
		dc: kekOnly.With(&config.DecryptConfig{Parameters: map[string][][]byte{"privkeys": {testKeys[1]}, "privkeys-passwords": {nil}}}),
	}
}

// put writes a blob and returns its descriptor.
func (s *store) put(mediaType, text string) ocispec.Descriptor {
	s.t.Helper()
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromString(text), Size: int64(len(text))}
	if err := content.WriteBlob(s.ctx, s, desc.Digest.String(), strings.NewReader(text), desc); err != nil {
		s.t.Fatal(err)
	}
	return desc
}

func (s *store) get(desc ocispec.Descriptor) string {
	s.t.Helper()
	b, err := content.ReadBlob(s.ctx, s, desc)
	if err != nil {
		s.t.Fatal(err)
	}
	return string(b)
}

// blobs counts the blobs in the store.
func (s *store) blobs() (n int) {
	s.t.Helper()
	if err := s.Walk(s.ctx, func(content.Info) error { n++; return nil }); err != nil {
		s.t.Fatal(err)
	}
	return n
}

// noIngests checks that no work is left unfinished.
func (s *store) noIngests() {
	s.t.Helper()
	statuses, err := s.ListStatuses(context.WithoutCancel(s.ctx))
	if err != nil || len(statuses) > 0 {
		s.t.Errorf("ingests left behind: %v, %v", statuses, err)
	}
}

const (
	ociManifest    = ocispec.MediaTypeImageManifest
	ociIndex       = ocispec.MediaTypeImageIndex
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
	dockerGzip     = "application/vnd.docker.image.rootfs.diff.tar.gzip"
	dockerForeign  = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
)

// ref is a descriptor's digest and size as JSON members.
func ref(d ocispec.Descriptor) string {
	return fmt.Sprintf(`"digest": "%s", "size":%d`, d.Digest, d.Size)
}

// testImages are images by name. Each builds one in a store.
func testImages(s *store) map[string]ocispec.Descriptor {
	conf := s.put(ocispec.MediaTypeImageConfig, `{"architecture":"amd64","os":"linux"}`)
	a, b := s.put(ocispec.MediaTypeImageLayer, "layer a"), s.put(ocispec.MediaTypeImageLayer, strings.Repeat("layer b", 100000))
	plain := s.put(ociManifest, `{"schemaVersion":2,"mediaType":"`+ociManifest+`","config":{"mediaType":"`+conf.MediaType+`",`+ref(conf)+`},"layers":[{"mediaType":"`+a.MediaType+`",`+ref(a)+`}]}`)
	odd := s.put(ociManifest, "\n{ \"layers\" :[\n\t{"+ref(a)+" ,\"mediaType\": \"application/vnd.oci.image.layer.v1.tar+gzip\",\"annotations\":{ } , \"x\":1.50e2 },"+
		`{"mediaType":"application/vnd.oci.image.layer.v1.tar+zstd","annotations":{"k":"v<&>é","k2":""},`+ref(b)+`, "urls":[]}, {"mediaType":"`+a.MediaType+`",`+ref(a)+`,"annotations":null}
		],"subject":{"mediaType":"x/y",`+ref(a)+`}, "artifactType":"a/b","config" : {"mediaType":"`+conf.MediaType+`",`+ref(conf)+`}, "annotations":{"m":"n"},"unknown":[{"layers":[]}] }`+"\n\n")
	docker := s.put(dockerManifest, `{
   "schemaVersion": 2,
   "mediaType": "`+dockerManifest+`",
   "config": {
      "mediaType": "`+dockerConfig+`", `+ref(conf)+`
   },
   "layers": [
      {"mediaType": "`+dockerForeign+`", "digest": "sha256:`+strings.Repeat("a", 64)+`", "size": 5, "urls": ["https://example.com/x"]},
      {"mediaType": "`+dockerGzip+`", `+ref(a)+`},
      {"mediaType": "`+dockerGzip+`", `+ref(b)+`}
   ]
}`)
	attestation := s.put(ociManifest, `{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json",`+ref(conf)+`},"layers":[{"mediaType":"application/vnd.in-toto+json",`+ref(a)+`}]}`)
	entry := func(d ocispec.Descriptor, more string) string {
		return `{"mediaType":"` + d.MediaType + `",` + ref(d) + more + `}`
	}
	index := s.put(ociIndex, `{"schemaVersion":2,"manifests":[`+strings.Join([]string{
		entry(plain, `,"platform":{"architecture":"amd64","os":"linux"},"annotations":{"e":"f"}`),
		entry(odd, `,"platform":{"architecture":"arm64","os":"linux","variant":"v8"}`),
		entry(attestation, `,"annotations":{"vnd.docker.reference.digest":"`+plain.Digest.String()+`"},"platform":{"architecture":"unknown","os":"unknown"}`),
		entry(ocispec.Descriptor{MediaType: ociManifest, Digest: digest.FromString("absent"), Size: 7}, `,"platform":{"architecture":"s390x","os":"linux"}`),
		entry(ocispec.Descriptor{MediaType: "application/vnd.other", Digest: digest.FromString("other"), Size: 7}, ``),
	}, ", ")+`],"annotations":{"i":"j"}}`)
	list := s.put(dockerList, `{"schemaVersion":2,"mediaType":"`+dockerList+`","manifests":[`+entry(docker, `,"platform":{"architecture":"amd64","os":"linux"}`)+`]}`)
	nested := s.put(ociIndex, `{"manifests":[`+entry(index, "")+`,`+entry(docker, "")+`]}`)
	return map[string]ocispec.Descriptor{"plain": plain, "odd": odd, "docker": docker, "index": index, "docker list": list, "nested": nested}
}

func TestDecryptGivesBackTheImage(t *testing.T) {
	s := newStore(t)
	for name, target := range testImages(s) {
		// Docker's foreign layer is not here.
		encrypted, err := Encrypt(s.ctx, s, target, s.ec, Options{AllowPlain: true})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if regexp.MustCompile(`"mediaType": *"application/vnd.docker`).MatchString(s.get(encrypted.Target)) {
			t.Errorf("%s: encrypted, it still has Docker's types: %s", name, s.get(encrypted.Target))
		}
		layers, err := Layers(s.ctx, s, encrypted.Target, Options{})
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for _, l := range layers {
			if strings.Contains(l.Descriptor.MediaType, "nondistributable") {
				continue
			}
			if !processor.IsEncrypted(l.Descriptor.MediaType) || strings.Contains(s.get(l.Descriptor), "layer") {
				t.Errorf("%s: layer %d is not encrypted: %+v", name, l.Index, l.Descriptor)
			}
		}
		// More recipients change nothing of the layers.
		again, err := Encrypt(s.ctx, s, encrypted.Target, processor.Recipients{Keys: s.dc, Parameters: s.ec.Parameters}, Options{AllowPlain: true})
		if err != nil || again.Layers != encrypted.Layers {
			t.Errorf("%s, more recipients: %+v, %v", name, again, err)
		}
		for _, target := range []ocispec.Descriptor{encrypted.Target, again.Target} {
			decrypted, err := Decrypt(s.ctx, s, target, s.dc, Options{})
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if got := decrypted.Target; got.Digest != testImages(s)[name].Digest || got.MediaType != testImages(s)[name].MediaType || got.Size != testImages(s)[name].Size {
				t.Errorf("%s: came back as\n%s\nwas\n%s", name, s.get(got), s.get(testImages(s)[name]))
			}
		}
		s.noIngests()
	}
}

// TestLayersDecryptOneByOne decrypts a Docker image one layer at a time.
func TestLayersDecryptOneByOne(t *testing.T) {
	s := newStore(t)
	target := testImages(s)["docker"]
	result, err := Encrypt(s.ctx, s, target, s.ec, Options{Layers: []int{1, 2}})
	if err != nil {
		t.Fatal(err)
	}
	for _, layer := range []int{-1, 1} {
		if result, err = Decrypt(s.ctx, s, result.Target, s.dc, Options{Layers: []int{layer}}); err != nil || result.Layers != 1 {
			t.Fatalf("layer %d: %+v, %v", layer, result, err)
		}
	}
	if result.Target.Digest != target.Digest || result.Target.MediaType != target.MediaType {
		t.Errorf("came back as\n%s", s.get(result.Target))
	}
}

func TestOnlySelectedLayersChange(t *testing.T) {
	s := newStore(t)
	index := testImages(s)["index"]
	amd64, s390x, riscv := platforms.MustParse("linux/amd64"), platforms.MustParse("linux/s390x"), platforms.MustParse("linux/riscv64")
	for _, test := range []struct {
		opts   Options
		layers int
		want   string
	}{
		// The attestation has one layer, and is about linux/amd64.
		{Options{}, 4, ""},
		{Options{Attestations: KeepAttestations}, 3, ""},
		{Options{Attestations: DropAttestations}, 3, ""},
		{Options{Attestations: "burn"}, 0, "use encrypt, drop or keep"},
		{Options{Platforms: []ocispec.Platform{amd64}}, 2, ""},
		{Options{Layers: []int{0}}, 3, ""},
		{Options{Layers: []int{-1}}, 2, ""},
		{Options{Layers: []int{2, 1}}, 2, ""},
		{Options{Layers: []int{7}}, 0, "no layer 7"},
		{Options{Layers: []int{-9}}, 0, "no layer -9"},
		{Options{Platforms: []ocispec.Platform{riscv}}, 0, "no platform linux/riscv64"},
		{Options{Platforms: []ocispec.Platform{s390x}}, 0, "is not here"},
	} {
		result, err := Encrypt(s.ctx, s, index, s.ec, test.opts)
		if test.want == "" && (err != nil || result.Layers != test.layers) || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%+v: %+v, %v", test.opts, result, err)
		}
	}
	result, err := Encrypt(s.ctx, s, index, s.ec, Options{KeepAbsent: true})
	if err != nil || len(result.Skipped) != 1 || len(result.LeftOut) != 0 || result.Skipped[0].Platform.Architecture != "s390x" {
		t.Errorf("skipped: %+v, %v", result.Skipped, err)
	}
	var encrypted ocispec.Index
	if err := json.Unmarshal([]byte(s.get(result.Target)), &encrypted); err != nil {
		t.Fatal(err)
	}
	if got := encrypted.Manifests[2].Annotations[attestationAnnotation]; got != encrypted.Manifests[0].Digest.String() {
		t.Errorf("the attestation is about %s, not %s", got, encrypted.Manifests[0].Digest)
	}
}

// TestPeer has imgcrypt decrypt what we encrypt, and the reverse.
func TestPeer(t *testing.T) {
	s := newStore(t)
	all := func(ocispec.Descriptor) bool { return true }
	cc := &config.CryptoConfig{EncryptConfig: &config.EncryptConfig{Parameters: s.ec.Parameters}, DecryptConfig: s.dc.Private}
	for name, target := range testImages(s) {
		if name == "odd" || name == "index" || name == "nested" || strings.HasPrefix(name, "docker") {
			// imgcrypt wants nothing out of the ordinary; the plain one and
			// the two below will do.
			continue
		}
		ours, err := Encrypt(s.ctx, s, target, s.ec, Options{})
		if err != nil {
			t.Fatal(err)
		}
		theirs, modified, err := imgcrypt.DecryptImage(s.ctx, s, ours.Target, cc, all)
		if err != nil || !modified {
			t.Fatalf("%s: imgcrypt does not decrypt ours: %v", name, err)
		}
		checkLayers(s, theirs, target)
		theirs, _, err = imgcrypt.EncryptImage(s.ctx, s, target, cc, all)
		if err != nil {
			t.Fatal(err)
		}
		ours, err = Decrypt(s.ctx, s, theirs, s.dc, Options{})
		if err != nil {
			t.Fatalf("%s: we do not decrypt imgcrypt's: %v", name, err)
		}
		checkLayers(s, ours.Target, target)
	}
	for _, mediaType := range []string{ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd, dockerGzip} {
		conf := s.put(ocispec.MediaTypeImageConfig, `{"architecture":"amd64","os":"linux"}`)
		l := s.put(mediaType, "content of "+mediaType)
		target := s.put(ociManifest, `{"schemaVersion":2,"config":{"mediaType":"`+conf.MediaType+`",`+ref(conf)+`},"layers":[{"mediaType":"`+mediaType+`",`+ref(l)+`}]}`)
		ours, err := Encrypt(s.ctx, s, target, s.ec, Options{})
		if err != nil {
			t.Fatal(err)
		}
		theirs, _, err := imgcrypt.DecryptImage(s.ctx, s, ours.Target, cc, all)
		if err != nil {
			t.Fatalf("%s: imgcrypt does not decrypt ours: %v", mediaType, err)
		}
		checkLayers(s, theirs, target)
		if theirs, _, err = imgcrypt.EncryptImage(s.ctx, s, target, cc, all); err != nil {
			t.Fatal(err)
		}
		if ours, err = Decrypt(s.ctx, s, theirs, s.dc, Options{}); err != nil {
			t.Fatalf("%s: we do not decrypt imgcrypt's: %v", mediaType, err)
		}
		checkLayers(s, ours.Target, target)
	}
}

// checkLayers checks that two manifests have the same layers.
func checkLayers(s *store, got, want ocispec.Descriptor) {
	s.t.Helper()
	a, err := Layers(s.ctx, s, got, Options{})
	if err != nil {
		s.t.Fatal(err)
	}
	b, err := Layers(s.ctx, s, want, Options{})
	if err != nil || len(a) != len(b) {
		s.t.Fatalf("%d layers, want %d, %v", len(a), len(b), err)
	}
	for i := range a {
		if a[i].Descriptor.Digest != b[i].Descriptor.Digest {
			s.t.Errorf("layer %d is %s, want %s", i, a[i].Descriptor.Digest, b[i].Descriptor.Digest)
		}
	}
}

func TestUnusableImagesAreErrors(t *testing.T) {
	s := newStore(t)
	conf := s.put(ocispec.MediaTypeImageConfig, `{"architecture":"amd64","os":"linux"}`)
	a := s.put(ocispec.MediaTypeImageLayer, "layer a")
	manifest := func(layers string) ocispec.Descriptor {
		return s.put(ociManifest, `{"config":{"mediaType":"`+conf.MediaType+`",`+ref(conf)+`},"layers":[`+layers+`]}`)
	}
	layer := `{"mediaType":"` + a.MediaType + `",` + ref(a)
	for _, test := range []struct {
		name   string
		target ocispec.Descriptor
		want   string
	}{
		{"twice", manifest(layer + `,"digest":"` + a.Digest.String() + `"}`), `duplicate key "digest"`},
		{"case", manifest(layer + `,"Digest":"` + a.Digest.String() + `"}`), `can be taken for "digest"`},
		{"data", manifest(layer + `,"data":"bGF5ZXIgYg=="}`), "data that is not its content"},
		{"data in other words", manifest(layer + `,"data":"bGF5ZXIgYQ\u003d="}`), "data that is not its content"},
		{"size", manifest(strings.Replace(layer, `"size":7`, `"size":8`, 1) + "}"), "has 7 bytes, and the manifest says 8"},
		{"absent layer", manifest(`{"mediaType":"` + a.MediaType + `","digest":"` + digest.FromString("no").String() + `","size":2}`), "is not here"},
		{"no JSON", s.put(ociManifest, `{"layers":`), "manifest sha256:"},
		{"huge", ocispec.Descriptor{MediaType: ociManifest, Digest: a.Digest, Size: maxManifest + 1}, "more than"},
		{"understated", ocispec.Descriptor{MediaType: ociManifest, Digest: s.put("", strings.Repeat(" ", maxManifest+1)).Digest, Size: 7}, "more than"},
		{"both", s.put(ociManifest, `{"manifests":[],"layers":[]}`), "an index and a manifest at once"},
		{"both", s.put(ociIndex, `{"manifests":[],"config":{}}`), "an index and a manifest at once"},
		{"schema 1", ocispec.Descriptor{MediaType: "application/vnd.docker.distribution.manifest.v1+prettyjws", Digest: a.Digest}, "schema 1"},
		{"not an image", ocispec.Descriptor{MediaType: "text/plain", Digest: a.Digest}, "is not an image"},
	} {
		if _, err := Encrypt(s.ctx, s, test.target, s.ec, Options{}); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", test.name, err, test.want)
		}
		s.noIngests()
	}
}

func TestUndecryptableImagesAreErrors(t *testing.T) {
	for _, change := range []func(string) string{
		func(c string) string { return c[:len(c)-1] + string([]byte{c[len(c)-1] ^ 1}) },
		func(c string) string { return string([]byte{c[0] ^ 1}) + c[1:] },
	} {
		s := newStore(t)
		result, err := Encrypt(s.ctx, s, testImages(s)["plain"], s.ec, Options{})
		if err != nil {
			t.Fatal(err)
		}
		layers, err := Layers(s.ctx, s, result.Target, Options{})
		if err != nil {
			t.Fatal(err)
		}
		old := layers[0].Descriptor
		tampered := s.put(old.MediaType, change(s.get(old)))
		target := s.put(ociManifest, strings.Replace(s.get(result.Target), old.Digest.String(), tampered.Digest.String(), 1))
		before := s.blobs()
		_, err = Decrypt(s.ctx, s, target, s.dc, Options{})
		if !errors.Is(err, processor.ErrTampered) || !strings.Contains(err.Error(), tampered.Digest.String()) {
			t.Errorf("tampered: %v", err)
		}
		_, otherPrivate, err := utils.CreateRSATestKey(2048, nil, true)
		if err != nil {
			t.Fatal(err)
		}
		wrong := processor.Keys{Private: &config.DecryptConfig{Parameters: map[string][][]byte{"privkeys": {otherPrivate}, "privkeys-passwords": {nil}}}}
		if _, err = Decrypt(s.ctx, s, result.Target, wrong, Options{}); !errors.Is(err, processor.ErrNoKey) {
			t.Errorf("wrong key: %v", err)
		}
		if after := s.blobs(); after != before {
			t.Errorf("%d blobs were committed", after-before)
		}
		s.noIngests()
	}
}

func TestCancelStopsEncryption(t *testing.T) {
	s := newStore(t)
	target := testImages(s)["odd"]
	opts := Options{Progress: func(ocispec.Descriptor, int) { s.stopped() }}
	if _, err := Encrypt(s.ctx, s, target, s.ec, opts); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	s.noIngests()
}

// TestFullDiskIsAnError writes to a store whose disk is full.
func TestFullDiskIsAnError(t *testing.T) {
	s := newStore(t)
	target := testImages(s)["plain"]
	s.Store = fullStore{s.Store}
	if _, err := Encrypt(s.ctx, s, target, s.ec, Options{}); !errors.Is(err, errFull) {
		t.Errorf("got %v", err)
	}
	s.noIngests()
}

var errFull = errors.New("no space left on device")

type fullStore struct{ content.Store }

func (s fullStore) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	w, err := s.Store.Writer(ctx, opts...)
	return fullWriter{w}, err
}

type fullWriter struct{ content.Writer }

func (fullWriter) Write([]byte) (int, error) { return 0, errFull }

func TestZeroKeysAreErrors(t *testing.T) {
	s := newStore(t)
	plain := s.manifest(ociManifest, entry(s.put(ocispec.MediaTypeImageLayer, "layer a")), "")
	if _, err := Encrypt(s.ctx, s, plain, processor.Recipients{}, Options{}); err == nil || !strings.Contains(err.Error(), "recipient") {
		t.Errorf("without recipients: %v", err)
	}
	encrypted := s.encrypted(s.ec)
	if _, err := Decrypt(s.ctx, s, encrypted, processor.Keys{}, Options{}); !errors.Is(err, processor.ErrNoKey) {
		t.Errorf("without keys: %v", err)
	}
	if err := CheckAccess(s.ctx, s, encrypted, processor.Keys{}, platforms.All); !errors.Is(err, processor.ErrNoKey) {
		t.Errorf("access without keys: %v", err)
	}
	if _, err := Rewrap(s.ctx, s, encrypted, Rewrapping{Add: map[string][][]byte{"pubkeys": {testKeys[0]}}}, Options{}); !errors.Is(err, processor.ErrNoKey) {
		t.Errorf("rewrapped without keys: %v", err)
	}
}

// TestStoreWithoutLabels encrypts an image twice in a store that has no labels, so that
// the second finds the documents of the first.
func TestStoreWithoutLabels(t *testing.T) {
	s := newStore(t)
	var err error
	if s.Store, err = local.NewStore(t.TempDir()); err != nil {
		t.Fatal(err)
	}
	target := s.encrypted(s.ec)
	for range 2 {
		if result, err := Decrypt(s.ctx, s, target, s.dc, Options{}); err != nil || result.Layers != 2 {
			t.Errorf("%+v, %v", result, err)
		}
	}
}

package image

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/jsonedit"
)

// mediaTypes are those of layers that people have in their images.
var mediaTypes = []string{
	ocispec.MediaTypeImageLayer,
	ocispec.MediaTypeImageLayerGzip,
	ocispec.MediaTypeImageLayerZstd,
	"application/vnd.oci.image.layer.v1.tar+bzip2",
	"application/vnd.oci.image.layer.v1.tar+xz",
	"application/vnd.oci.image.layer.nondistributable.v1.tar",
	"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
	"application/vnd.oci.image.layer.nydus.blob.v1",
	"application/vnd.docker.image.rootfs.diff.tar.gzip",
	"application/vnd.docker.image.rootfs.foreign.diff.tar",
	"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
	"application/vnd.in-toto+json",
	"application/vnd.cncf.model.weight.v1.raw",
	"application/vnd.cncf.model.weight.v1.tar",
	"application/vnd.cncf.helm.chart.content.v1.tar+gzip",
	"application/vnd.erofs.layer.v1",
	"application/vnd.erofs.layer.v1+zstd",
	"application/vnd.sylabs.sif.layer.v1.sif",
	"application/vnd.wasm.content.layer.v1+wasm",
	"application/vnd.docker.ai.gguf.v3",
	"application/octet-stream",
	"Application/vnd.OCI.image.layer.v1.tar+GZIP",
	"application/vnd.oci.image.layer.v1.tar+gzip; charset=binary",
	"application/vnd.oci.image.layer.v1.tar+Encrypted",
	"text/plain;a=\"b\"",
}

// readable returns the digests of the blobs that an image has, whatever their
// types, and its documents.
func (s *store) reachable(desc ocispec.Descriptor) (blobs map[digest.Digest]bool, docs string) {
	s.t.Helper()
	var doc struct {
		Config            *ocispec.Descriptor
		Layers, Manifests []ocispec.Descriptor
	}
	text := s.get(desc)
	if json.Unmarshal([]byte(text), &doc) != nil {
		return map[digest.Digest]bool{desc.Digest: true}, ""
	}
	blobs, docs = map[digest.Digest]bool{}, text
	for _, l := range doc.Layers {
		blobs[l.Digest] = true
	}
	if doc.Config != nil {
		blobs[doc.Config.Digest] = true
	}
	for _, m := range doc.Manifests {
		if _, err := s.Info(s.ctx, m.Digest); err != nil {
			continue
		}
		more, text := s.reachable(m)
		for d := range more {
			blobs[d] = true
		}
		docs += text
	}
	return blobs, docs
}

// TestEveryMediaTypeComesBack encrypts layers of every media type and gets them back.
func TestEveryMediaTypeComesBack(t *testing.T) {
	s := newStore(t)
	var layers []string
	var plain []digest.Digest
	for _, mt := range mediaTypes {
		l := s.put(mt, "secret of "+mt)
		plain = append(plain, l.Digest)
		layers = append(layers, `{"mediaType":`+string(jsonedit.Quote(mt))+`,`+ref(l)+`,"urls":["https://example.com/x"]}`)
	}
	for _, kind := range []string{ociManifest, dockerManifest} {
		target := s.manifest(kind, strings.Join(layers, ","), "")
		out, err := Encrypt(s.ctx, s, target, s.ec, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if out.Layers != len(mediaTypes) {
			t.Errorf("%d layers of %d were encrypted", out.Layers, len(mediaTypes))
		}
		blobs, _ := s.reachable(out.Target)
		for i, d := range plain {
			if blobs[d] {
				t.Errorf("%s is readable", mediaTypes[i])
			}
		}
		readable, err := Inspect(s.ctx, s, out.Target, Options{})
		if err != nil || len(readable) != 1 || readable[0].Reason != ReasonConfig || len(NotEncrypted(readable)) != 0 {
			t.Errorf("readable afterwards: %v, %v", readable, err)
		}
		decrypted, err := Decrypt(s.ctx, s, out.Target, s.dc, Options{})
		if err != nil || decrypted.Target.Digest != target.Digest || decrypted.Target.MediaType != target.MediaType {
			t.Errorf("came back as %s, %v", s.get(decrypted.Target), err)
		}
		rewrapped, err := Rewrap(s.ctx, s, out.Target, Rewrapping{Keys: s.dc, Add: s.ec.Parameters}, Options{})
		if err != nil || rewrapped.Layers != len(mediaTypes) {
			t.Fatalf("rewrap: %+v, %v", rewrapped, err)
		}
		if decrypted, err = Decrypt(s.ctx, s, rewrapped.Target, s.dc, Options{}); err != nil || decrypted.Target.Digest != target.Digest {
			t.Errorf("rewrapped, it came back as %s, %v", s.get(decrypted.Target), err)
		}
	}
}

// reasons returns the reasons in a list, except configurations, each with the
// start of the blob's digest.
func reasons(list []Plain) (all []string) {
	for _, p := range NotEncrypted(list) {
		all = append(all, string(p.Reason)+" "+p.Platform)
	}
	slices.Sort(all)
	return all
}

// TestWhatStaysReadableIsNamed names what stays readable, and writes nothing unless it is accepted.
func TestWhatStaysReadableIsNamed(t *testing.T) {
	s := newStore(t)
	a, b := s.put(ocispec.MediaTypeImageLayer, "layer a"), s.put(ocispec.MediaTypeImageLayer, "layer b")
	amd := s.manifest(ociManifest, entry(a), "")
	arm := s.put(ociManifest, strings.Replace(s.get(s.manifest(ociManifest, entry(b), "")), "amd64", "arm64", 1))
	on := func(d ocispec.Descriptor, arch, more string) string {
		return `{"mediaType":"` + d.MediaType + `",` + ref(d) + `,"platform":{"os":"linux","architecture":"` + arch + `"}` + more + `}`
	}
	index := func(entries ...string) ocispec.Descriptor {
		return s.put(ociIndex, `{"manifests":[`+strings.Join(entries, " , ")+`]}`)
	}
	gone := ocispec.Descriptor{MediaType: ociManifest, Digest: digest.FromString("gone"), Size: 4}
	goneLayer := strings.Replace(entry(ocispec.Descriptor{MediaType: dockerForeign, Digest: gone.Digest, Size: 4}), "}", `,"urls":["https://example.com/l"]}`, 1)
	statement := s.put("application/vnd.in-toto+json", `{"sbom":1}`)
	attestation := s.manifest(ociManifest, entry(statement), "")
	about := func(d ocispec.Descriptor) string {
		return on(attestation, "unknown", `,"annotations":{"`+attestationAnnotation+`":"`+d.Digest.String()+`","`+attestationTypeAnnotation+`":"attestation-manifest"}`)
	}
	other := s.put("application/vnd.other", "other")
	amd64 := []ocispec.Platform{platforms.MustParse("linux/amd64")}
	noKey := s.put(ocispec.MediaTypeImageLayer+"+encrypted", "who knows")
	config := `{"config":{"mediaType":"` + ocispec.MediaTypeImageConfig + `",` + ref(a) + `},"layers":[` + entry(a) + `]}`
	empty := s.put(ocispec.MediaTypeEmptyJSON, "{}")

	for name, test := range map[string]struct {
		target ocispec.Descriptor
		opts   Options
		plain  []string
		left   int // out
		refuse bool
	}{
		"all encrypted":         {index(on(amd, "amd64", ""), on(arm, "arm64", ""), about(amd)), Options{}, nil, 0, false},
		"layer":                 {amd, Options{Layers: []int{0}}, nil, 0, false},
		"platform":              {index(on(amd, "amd64", ""), on(arm, "arm64", ""), about(amd), about(arm)), Options{Platforms: amd64}, []string{"not-selected linux/arm64", "not-selected linux/arm64"}, 0, false},
		"no layer of it":        {s.manifest(ociManifest, entry(a)+","+entry(b), ""), Options{Layers: []int{1}}, []string{"not-selected linux/amd64"}, 0, false},
		"absent":                {index(on(gone, "arm64", ""), on(amd, "amd64", "")), Options{}, nil, 1, false},
		"absent, kept":          {index(on(gone, "arm64", ""), on(amd, "amd64", "")), Options{KeepAbsent: true}, []string{"absent linux/arm64"}, 0, false},
		"absent, not selected":  {index(on(gone, "arm64", ""), on(amd, "amd64", "")), Options{Platforms: amd64}, nil, 1, false},
		"absent layer":          {index(on(amd, "amd64", ""), on(s.manifest(ociManifest, entry(ocispec.Descriptor{MediaType: a.MediaType, Digest: gone.Digest, Size: 4}), ""), "arm64", "")), Options{}, nil, 1, false},
		"absent, attested":      {index(about(gone), on(gone, "arm64", ""), on(amd, "amd64", "")), Options{}, nil, 2, false},
		"absent index":          {index(on(amd, "amd64", ""), entry(ocispec.Descriptor{MediaType: ociIndex, Digest: gone.Digest, Size: 4})), Options{}, nil, 1, false},
		"index of absent":       {index(on(amd, "amd64", ""), entry(index(on(gone, "arm64", "")))), Options{}, nil, 2, false},
		"attestation, kept":     {index(on(amd, "amd64", ""), about(amd)), Options{Attestations: KeepAttestations}, []string{"attestation linux/unknown"}, 0, false},
		"attestation, dropped":  {index(about(amd), on(amd, "amd64", "")), Options{Attestations: DropAttestations}, nil, 1, false},
		"foreign":               {s.manifest(ociManifest, entry(a)+","+goneLayer, ""), Options{}, []string{"foreign linux/amd64"}, 0, true},
		"foreign, not selected": {s.manifest(ociManifest, entry(a)+","+goneLayer, ""), Options{Layers: []int{0}}, []string{"not-selected linux/amd64"}, 0, false},
		"urls":                  {s.manifest(ociManifest, strings.TrimSuffix(entry(a), "}")+`,"urls":["https://example.com/a"]}`, ""), Options{}, []string{"urls linux/amd64"}, 0, false},
		"dropped, and no layer": {index(on(s.manifest(ociManifest, "", ""), "amd64", ""), about(amd)), Options{Attestations: DropAttestations}, nil, 1, false},
		"absent, and no layer":  {index(on(s.manifest(ociManifest, "", ""), "amd64", ""), entry(s.manifest(ociManifest, entry(a)+","+entry(ocispec.Descriptor{MediaType: a.MediaType, Digest: gone.Digest, Size: 4}), ""))), Options{}, nil, 1, false},
		"no manifest":           {index(on(amd, "amd64", ""), entry(other)), Options{}, []string{"not-an-image "}, 0, true},
		"absent no manifest":    {index(on(amd, "amd64", ""), entry(ocispec.Descriptor{MediaType: "application/vnd.other", Digest: gone.Digest})), Options{}, nil, 1, false},
		"capital manifest":      {index(on(amd, "amd64", ""), entry(ocispec.Descriptor{MediaType: strings.ToUpper(ociManifest), Digest: arm.Digest, Size: arm.Size})), Options{}, nil, 0, false},
		"no media type":         {s.manifest(ociManifest, entry(a)+`,{`+ref(b)+`}`, ""), Options{}, []string{"media-type linux/amd64"}, 0, true},
		"encrypted twice":       {s.manifest(ociManifest, entry(a)+`,{"mediaType":"text/plain+encrypted+encrypted",`+ref(b)+`}`, ""), Options{}, []string{"media-type linux/amd64"}, 0, true},
		"config":                {s.put(ociManifest, config), Options{}, []string{"also-config "}, 0, true},
		"empty config":          {s.put(ociManifest, `{"config":{"mediaType":"`+empty.MediaType+`",`+ref(empty)+`},"layers":[`+entry(empty)+`]}`), Options{}, nil, 0, false},
		"no key, not selected":  {s.manifest(ociManifest, entry(a)+","+entry(noKey), ""), Options{Layers: []int{0}}, []string{"not-selected linux/amd64"}, 0, false},
	} {
		before := s.blobs()
		out, err := Encrypt(s.ctx, s, test.target, s.ec, test.opts)
		var refused *PlainError
		if test.refuse {
			if !errors.As(err, &refused) || fmt.Sprint(reasons(refused.Plain)) != fmt.Sprint(test.plain) || s.blobs() != before {
				t.Errorf("%s: %+v, %v, %d blobs were written", name, out, err, s.blobs()-before)
			}
			test.opts.AllowPlain = true
			out, err = Encrypt(s.ctx, s, test.target, s.ec, test.opts)
		}
		if err != nil || fmt.Sprint(reasons(out.Plain)) != fmt.Sprint(test.plain) || len(out.LeftOut) != test.left {
			t.Errorf("%s: %v, %v, %d left out", name, err, reasons(out.Plain), len(out.LeftOut))
			continue
		}
		// What is not named is not readable.
		blobs, docs := s.reachable(out.Target)
		was, _ := s.reachable(test.target)
		for d := range was {
			named := slices.ContainsFunc(out.Plain, func(p Plain) bool { return p.Digest == d })
			if !named && (blobs[d] || strings.Contains(docs, d.String())) {
				t.Errorf("%s: %s is readable and not named", name, d)
			}
		}
		// What encryption reports, the result shows, as far as it can.
		readable, err := Inspect(s.ctx, s, out.Target, Options{})
		encrypted := !slices.ContainsFunc(NotEncrypted(out.Plain), func(p Plain) bool { return p.Reason != ReasonURLs && p.Reason != ReasonSharedConfig })
		if err != nil || (len(NotEncrypted(readable)) == 0) != encrypted {
			t.Errorf("%s: readable in the result: %v, %v", name, readable, err)
		}
		if name == "no key, not selected" {
			continue
		}
		decrypted, err := Decrypt(s.ctx, s, out.Target, s.dc, Options{})
		if err != nil || decrypted.Target.Digest != test.target.Digest {
			t.Errorf("%s: came back as\n%s, %v\nwas\n%s", name, s.get(decrypted.Target), err, s.get(test.target))
		}
		s.noIngests()
	}
}

// TestSubjectsFollow has manifests refer to others of the same index.
func TestSubjectsFollow(t *testing.T) {
	s := newStore(t)
	a, sbom := s.put(ocispec.MediaTypeImageLayer, "layer a"), s.put("application/spdx+json", "sbom")
	img := s.manifest(ociManifest, entry(a), "")
	list := s.put(ociIndex, `{"manifests":[`+entry(img)+`]}`)
	subject := func(d ocispec.Descriptor, more string) string {
		return ` , "subject" : {"mediaType":"` + d.MediaType + `",` + ref(d) + more + `}`
	}
	first := s.manifest(ociManifest, entry(sbom), subject(img, `,"data":"`+base64.StdEncoding.EncodeToString([]byte(s.get(img)))+`"`))
	second := s.manifest(ociManifest, entry(sbom), subject(first, ""))
	third := s.put(ociIndex, `{"manifests":[`+entry(img)+`]`+subject(list, "")+`}`)
	outside := s.manifest(ociManifest, entry(sbom), subject(ocispec.Descriptor{MediaType: ociManifest, Digest: digest.FromString("x"), Size: 1}, ""))
	docker := s.manifest(dockerManifest, entry(s.put(dockerGzip, "layer d")), "")
	ofDocker := s.manifest(ociManifest, entry(sbom), strings.Replace(subject(docker, ""), "sha256:", `sha256\u003A`, 1))
	// A referrer may come before what it refers to.
	target := s.put(ociIndex, `{"manifests":[`+strings.Join([]string{entry(third), entry(second), entry(first), entry(outside), entry(ofDocker), entry(img), entry(list), entry(docker)}, ",")+`]}`)
	for _, opts := range []Options{{}, {Layers: []int{0}}} {
		out, err := Encrypt(s.ctx, s, target, s.ec, opts)
		if err != nil {
			t.Fatal(err)
		}
		var index ocispec.Index
		if err := json.Unmarshal([]byte(s.get(out.Target)), &index); err != nil {
			t.Fatal(err)
		}
		for at, refersTo := range map[int]int{0: 6, 1: 2, 2: 5, 4: 7} {
			var doc struct{ Subject ocispec.Descriptor }
			if err := json.Unmarshal([]byte(s.get(index.Manifests[at])), &doc); err != nil {
				t.Fatal(err)
			}
			want := index.Manifests[refersTo]
			if doc.Subject.Digest != want.Digest || doc.Subject.Size != want.Size || doc.Subject.MediaType != want.MediaType || len(doc.Subject.Data) > 0 {
				t.Errorf("%d refers to %+v, not %+v", at, doc.Subject, want)
			}
		}
		if !strings.Contains(s.get(index.Manifests[3]), digest.FromString("x").String()) {
			t.Error("what refers to another image does not any more")
		}
		_, docs := s.reachable(out.Target)
		for _, d := range []ocispec.Descriptor{img, list, first, second, third, docker, ofDocker} {
			if strings.Contains(docs, d.Digest.Encoded()) {
				t.Errorf("%s still stands in the image", d.Digest)
			}
		}
		decrypted, err := Decrypt(s.ctx, s, out.Target, s.dc, Options{})
		if err != nil || decrypted.Target.Digest != target.Digest {
			t.Errorf("came back as\n%s, %v\nwas\n%s", s.get(decrypted.Target), err, s.get(target))
		}
	}
}

// TestDataComesBack encrypts blobs and manifests whose descriptors hold them.
func TestDataComesBack(t *testing.T) {
	s := newStore(t)
	data := func(text string) string {
		return `, "data" : "` + base64.StdEncoding.EncodeToString([]byte(text)) + `" ,"x":1}`
	}
	a := s.put(ocispec.MediaTypeImageLayer, "layer a")
	here := strings.TrimSuffix(entry(a), "}") + data("layer a")
	absent := ocispec.Descriptor{MediaType: "text/plain", Digest: digest.FromString("only here"), Size: 9}
	img := s.manifest(ociManifest, here+","+strings.TrimSuffix(entry(absent), "}")+data("only here"), "")
	target := s.put(ociIndex, `{"manifests":[`+strings.TrimSuffix(entry(img), "}")+data(s.get(img))+`]}`)
	out, err := Encrypt(s.ctx, s, target, s.ec, Options{})
	if err != nil || out.Layers != 2 {
		t.Fatalf("%+v, %v", out, err)
	}
	if _, docs := s.reachable(out.Target); strings.Contains(docs, base64.StdEncoding.EncodeToString([]byte("layer a"))) || strings.Contains(docs, a.Digest.Encoded()) {
		t.Errorf("the layer is readable: %s", docs)
	}
	decrypted, err := Decrypt(s.ctx, s, out.Target, s.dc, Options{})
	if err != nil || decrypted.Target.Digest != target.Digest {
		t.Errorf("came back as\n%s, %v\nwas\n%s", s.get(decrypted.Target), err, s.get(target))
	}
}

// TestDataOfOthers rewraps and decrypts an image whose index holds manifests.
func TestDataOfOthers(t *testing.T) {
	s := newStore(t)
	img := s.manifest(ociManifest, entry(s.put(ocispec.MediaTypeImageLayer, "layer a")), "")
	out, err := Encrypt(s.ctx, s, img, s.ec, Options{})
	if err != nil {
		t.Fatal(err)
	}
	data := base64.StdEncoding.EncodeToString([]byte(s.get(out.Target)))
	target := s.put(ociIndex, `{"manifests":[`+strings.TrimSuffix(entry(out.Target), "}")+`,"data":"`+data+`"}]}`)
	rewrapped, err := Rewrap(s.ctx, s, target, Rewrapping{Keys: s.dc, Add: s.ec.Parameters}, Options{})
	if err != nil || rewrapped.Layers != 1 {
		t.Fatalf("rewrap: %+v, %v", rewrapped, err)
	}
	for _, d := range []ocispec.Descriptor{target, rewrapped.Target} {
		decrypted, err := Decrypt(s.ctx, s, d, s.dc, Options{})
		if err != nil || strings.Contains(s.get(decrypted.Target), data) || !strings.Contains(s.get(decrypted.Target), img.Digest.String()) {
			t.Errorf("decrypted to %s, %v", s.get(decrypted.Target), err)
		}
	}
}

// TestLeftOutEntriesComeBack leaves entries out of an index, in several steps, and puts them back.
func TestLeftOutEntriesComeBack(t *testing.T) {
	s := newStore(t)
	docker := s.manifest(dockerManifest, entry(s.put(dockerGzip, "layer d")), "")
	a := s.manifest(ociManifest, entry(s.put(ocispec.MediaTypeImageLayer, "layer a")), "")
	gone := func(n int) string {
		return entry(ocispec.Descriptor{MediaType: ociManifest, Digest: digest.FromString(fmt.Sprint(n)), Size: 4})
	}
	sbom := s.manifest(ociManifest, entry(s.put("application/vnd.in-toto+json", "sbom")), "")
	attested := ref(sbom)
	attestation := strings.TrimSuffix(entry(sbom), "}") + `,"annotations":{"` + attestationAnnotation + `":"` + docker.Digest.String() + `"}}`
	for _, list := range []string{
		"\n [ " + gone(1) + "\n,\n" + entry(docker) + " ]",
		"[" + entry(docker) + "\t, " + gone(1) + "\n]",
		"[\n" + gone(1) + " , " + gone(2) + " ,\n" + entry(docker) + "," + gone(3) + ",  " + attestation + "," + entry(a) + " ," + gone(4) + " ]",
		"[" + attestation + ", " + gone(1) + ",\n" + entry(docker) + "]",
	} {
		target := s.put(dockerList, `{"mediaType":"`+dockerList+`", "manifests":`+list+`}`)
		out, err := Encrypt(s.ctx, s, target, s.ec, Options{KeepAbsent: true})
		if err != nil {
			t.Fatal(err)
		}
		ec := s.ec
		ec.Keys = s.dc
		for _, opts := range []Options{{Attestations: KeepAttestations}, {Attestations: DropAttestations}} {
			if out, err = Encrypt(s.ctx, s, out.Target, ec, opts); err != nil {
				t.Fatal(err)
			}
		}
		if strings.Contains(s.get(out.Target), `"manifests":`+list) {
			t.Error("nothing was left out")
		}
		out, err = Decrypt(s.ctx, s, out.Target, s.dc, Options{})
		if err != nil {
			t.Fatal(err)
		}
		// What was encrypted before it was dropped stays so.
		got, want := s.get(out.Target), s.get(target)
		if strings.Contains(list, attestation) {
			var index ocispec.Index
			if err := json.Unmarshal([]byte(got), &index); err != nil {
				t.Fatal(err)
			}
			i := slices.IndexFunc(index.Manifests, IsAttestation)
			if about := index.Manifests[i].Annotations[attestationAnnotation]; about != docker.Digest.String() {
				t.Errorf("the attestation is about %s", about)
			}
			got = regexp.MustCompile(string(index.Manifests[i].Digest)+`", "size":\d+`).ReplaceAllLiteralString(got, strings.TrimPrefix(strings.TrimSuffix(attested, "}"), `"digest": "`))
		}
		if got != want {
			t.Errorf("came back as\n%s\nwas\n%s", got, want)
		}
	}
	for _, text := range []string{`[{"index":9}]`, `{`, `[{"index":-1,"before":",1"}]`, `[{"index":0,"before":"],"}]`, `[{"index":0,"after":"1"}]`, `[{"index":0,"after":"],\"x\":["}]`} {
		if got, err := (restore{removedKey: text}).restoreElements([]byte(`[{}]`)); err == nil {
			t.Errorf("%s made it %s", text, got)
		}
	}
}

// TestNestedIndexWithAbsentEntryComesBack has an index get back what it had although one inside it has an
// entry that is not in the store, which was so when it was encrypted, or came later.
func TestNestedIndexWithAbsentEntryComesBack(t *testing.T) {
	s := newStore(t)
	a := s.manifest(ociManifest, entry(s.put(ocispec.MediaTypeImageLayer, "layer a")), "")
	b := s.manifest(ociManifest, entry(s.put(ocispec.MediaTypeImageLayer, "layer b")), "")
	none := s.manifest(ociManifest, "", "")
	gone := entry(ocispec.Descriptor{MediaType: ociManifest, Digest: digest.FromString("gone"), Size: 4})
	docker := func(list string) ocispec.Descriptor {
		return s.put(dockerList, `{"mediaType":"`+dockerList+`","manifests":[`+list+`]}`)
	}
	for name, inner := range map[string]string{
		"changed":       entry(b) + "," + gone,
		"unchanged":     gone + "," + entry(none),
		"plain and not": entry(none) + "," + entry(b),
	} {
		middle := docker(entry(a) + "," + entry(s.put(ociIndex, `{"manifests":[`+inner+`]}`)))
		target := docker(entry(middle))
		out, err := Encrypt(s.ctx, s, target, s.ec, Options{KeepAbsent: true})
		if err != nil {
			t.Fatal(err)
		}
		if name == "plain and not" {
			if err := s.Delete(s.ctx, none.Digest); err != nil {
				t.Fatal(err)
			}
		}
		out, err = Decrypt(s.ctx, s, out.Target, s.dc, Options{})
		if err != nil || out.Target.Digest != target.Digest {
			t.Errorf("%s: came back as %s, %v", name, s.get(out.Target), err)
		}
		none = s.manifest(ociManifest, "", "")
	}

	// The inner index is decrypted first, and its note goes.
	two := s.manifest(ociManifest, entry(s.put(ocispec.MediaTypeImageLayer, "layer c"))+","+entry(s.put(ocispec.MediaTypeImageLayer, "layer d")), "")
	target := docker(entry(two) + "," + entry(s.put(ociIndex, `{"manifests":[`+entry(b)+","+gone+`]}`)))
	out, err := Encrypt(s.ctx, s, target, s.ec, Options{KeepAbsent: true})
	for _, opts := range []Options{{Layers: []int{0}}, {}} {
		if err == nil {
			out, err = Decrypt(s.ctx, s, out.Target, s.dc, opts)
		}
	}
	if err != nil || out.Target.Digest != target.Digest {
		t.Errorf("in two steps it came back as %s, %v", s.get(out.Target), err)
	}
}

// TestPlainDigestsAreNotNoted spells digests unusually, and finds them nowhere afterwards.
func TestPlainDigestsAreNotNoted(t *testing.T) {
	s := newStore(t)
	a := s.put(ocispec.MediaTypeImageLayer, "layer a")
	all := ""
	for _, r := range a.Digest.String() {
		all += fmt.Sprintf(`\u%04X`, r)
	}
	for _, spelled := range []string{strings.Replace(a.Digest.String(), ":", `\u003a`, 1), strings.Replace(a.Digest.String(), ":", `\u003A`, 1), all} {
		target := s.manifest(ociManifest, strings.Replace(entry(a), a.Digest.String(), spelled, 1), "")
		out, err := Encrypt(s.ctx, s, target, s.ec, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if doc := s.get(out.Target); strings.Contains(doc, a.Digest.Encoded()) || strings.Contains(doc, `\\u0`) {
			t.Errorf("the digest of the plain layer is in %s", doc)
		}
		if out, err = Decrypt(s.ctx, s, out.Target, s.dc, Options{}); err != nil || out.Target.Digest != target.Digest {
			t.Errorf("came back as %s, %v", s.get(out.Target), err)
		}
	}
}

// TestInspectNamesWhatIsReadable names what is readable in images that others encrypted.
func TestInspectNamesWhatIsReadable(t *testing.T) {
	s := newStore(t)
	a := s.put(ocispec.MediaTypeImageLayer, "layer a")
	out, err := Encrypt(s.ctx, s, s.manifest(ociManifest, entry(a), ""), s.ec, Options{})
	if err != nil {
		t.Fatal(err)
	}
	layers, err := Layers(s.ctx, s, out.Target, Options{})
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(layers[0].Descriptor)
	if err != nil {
		t.Fatal(err)
	}
	encrypted := string(text)
	noKey := strings.Replace(entry(layers[0].Descriptor), "}", `,"annotations":{}}`, 1)
	gone := entry(ocispec.Descriptor{MediaType: ociManifest, Digest: digest.FromString("gone"), Size: 4})
	for name, test := range map[string]struct {
		target ocispec.Descriptor
		want   string
	}{
		"encrypted":      {s.manifest(ociManifest, encrypted, ""), "[]"},
		"plain":          {s.manifest(ociManifest, encrypted+","+entry(a), ""), "[not-encrypted linux/amd64]"},
		"no key":         {s.manifest(ociManifest, encrypted+","+noKey, ""), "[no-key linux/amd64]"},
		"urls":           {s.manifest(ociManifest, strings.Replace(encrypted, "{", `{"urls":["https://example.com"],`, 1), ""), "[urls linux/amd64]"},
		"not here":       {s.put(ociIndex, `{"manifests":[`+entry(s.manifest(ociManifest, encrypted, ""))+`,`+gone+`]}`), "[absent ]"},
		"not a manifest": {s.put(ociIndex, `{"manifests":[`+entry(s.manifest(ociManifest, encrypted, ""))+`,`+entry(a)+`]}`), "[not-an-image ]"},
	} {
		list, err := Inspect(s.ctx, s, test.target, Options{})
		if got := fmt.Sprint(reasons(list)); err != nil || len(list) == 0 || got != test.want {
			t.Errorf("%s: %s, %v, want %s", name, got, err, test.want)
		}
	}
}

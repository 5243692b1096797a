package image

import (
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// TestEntriesComeBack encrypts indexes of which entries are left out or attestations
// follow, and decrypts them at once, after rewrapping, and after encrypting again.
func TestEntriesComeBack(t *testing.T) {
	s := newStore(t)
	layer := s.put(ocispec.MediaTypeImageLayerGzip, "layer a")
	plain := s.manifest(ociManifest, entry(layer), "")
	docker := s.manifest(dockerManifest, `{"mediaType":"`+dockerGzip+`",`+ref(layer)+`}`, "")
	sbom := s.manifest(ociManifest, entry(s.put("application/vnd.in-toto+json", "sbom")), "")
	gone := ocispec.Descriptor{MediaType: ociManifest, Digest: digest.FromString("gone"), Size: 9}

	with := func(d ocispec.Descriptor, more string) string { return strings.TrimSuffix(entry(d), "}") + more + "}" }
	attestation := func(d ocispec.Descriptor, about string) string {
		return with(d, ` , "annotations" : {"vnd.docker.reference.digest" : "`+about+`","vnd.docker.reference.type":"attestation-manifest"}`)
	}
	small := func(d ocispec.Descriptor) string { return `\u0073` + d.Digest.String()[1:] }
	capital := func(d ocispec.Descriptor) string { return strings.Replace(d.Digest.String(), ":", `\u003A`, 1) }
	index := func(entries ...string) ocispec.Descriptor {
		return s.put(ociIndex, `{"manifests":[ `+strings.Join(entries, "\n,\t")+` ]}`)
	}
	amd64 := Options{Platforms: []ocispec.Platform{{OS: "linux", Architecture: "amd64"}}}
	drop, keep := Options{Attestations: DropAttestations}, Options{Attestations: KeepAttestations}

	for name, test := range map[string]struct {
		target ocispec.Descriptor
		opts   Options
		err    string
	}{
		// Of TestProperty's image 1795860834/5: the attestation's layers are not here.
		"escaped":            {target: index(entry(docker), attestation(gone, small(docker)))},
		"escaped, of OCI":    {target: index(entry(plain), attestation(gone, small(plain)))},
		"capitals":           {target: index(entry(plain), attestation(gone, capital(plain)))},
		"usual":              {target: index(entry(plain), attestation(gone, plain.Digest.String()))},
		"first":              {target: index(attestation(gone, small(plain)), entry(plain))},
		"twice":              {target: index(entry(plain), attestation(gone, small(plain)), attestation(gone, capital(plain)))},
		"among others":       {target: index(attestation(gone, capital(docker)), entry(plain), entry(gone), entry(docker), attestation(gone, plain.Digest.String()), attestation(gone, small(docker)))},
		"escaped key":        {target: index(entry(plain), strings.Replace(attestation(gone, small(plain)), "e.digest", `e\u002edigest`, 1))},
		"of what is gone":    {target: index(entry(plain), entry(gone), attestation(sbom, small(gone)))},
		"dropped":            {target: index(entry(plain), attestation(sbom, small(plain))), opts: drop},
		"encrypted":          {target: index(entry(plain), attestation(sbom, small(plain)))},
		"kept":               {target: index(entry(plain), attestation(sbom, small(plain))), opts: keep},
		"absent, then gone":  {target: index(entry(plain), attestation(gone, small(plain))), opts: Options{KeepAbsent: true}},
		"in another index":   {target: index(entry(index(entry(plain))), attestation(sbom, small(plain)))},
		"nothing else there": {target: index(entry(plain), entry(index(attestation(sbom, small(plain)), entry(gone)))), opts: keep},
		"one platform, then all": {
			target: index(with(plain, `,"platform":{"os":"linux","architecture":"amd64"}`), entry(index(entry(gone), with(docker, `,"platform":{"os":"linux","architecture":"arm64"}`)))),
			opts:   amd64,
		},
		"dropped, in another index": {target: index(entry(index(entry(plain))), attestation(sbom, small(plain))), opts: drop, err: plain.Digest.String() + " in another index"},
		"gone, in another index":    {target: index(entry(plain), entry(index(attestation(gone, plain.Digest.String()), entry(docker)))), err: plain.Digest.String() + " in another index"},
		"nothing is left":           {target: index(entry(gone)), err: "no layers of this image are here"},
		"only an attestation":       {target: index(attestation(sbom, small(plain))), opts: drop, err: "no layers of this image are here"},
		"strange URL":               {target: index(entry(plain), with(gone, `,"urls":["ftp://example.com/"]`)), err: "ftp://example.com/"},
		"annotation of encryption":  {target: index(entry(plain), with(gone, `,"annotations":{"org.opencontainers.image.enc.keys.jwe":"x"}`)), err: "image.enc.keys.jwe"},
	} {
		encrypted, err := Encrypt(s.ctx, s, test.target, s.ec, test.opts)
		if test.err != "" {
			if err == nil || !strings.Contains(err.Error(), test.err) {
				t.Errorf("%s: encrypted with error %v", name, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: encrypt: %v", name, err)
			continue
		}
		if test.opts.Platforms == nil && strings.Contains(s.get(encrypted.Target), plain.Digest.Encoded()) {
			t.Errorf("%s: the plain manifest's digest is in %s", name, s.get(encrypted.Target))
		}
		again, err := Encrypt(s.ctx, s, encrypted.Target, processor.Recipients{Keys: s.dc, Parameters: s.ec.Parameters}, Options{Attestations: test.opts.Attestations})
		if err != nil {
			t.Errorf("%s: encrypt again: %v", name, err)
			continue
		}
		rewrapped, err := Rewrap(s.ctx, s, encrypted.Target, Rewrapping{Keys: s.dc, Add: s.ec.Parameters}, Options{})
		if err != nil {
			t.Errorf("%s: rewrap: %v", name, err)
			continue
		}
		for how, target := range map[string]ocispec.Descriptor{"at once": encrypted.Target, "encrypted again": again.Target, "rewrapped": rewrapped.Target} {
			decrypted, err := Decrypt(s.ctx, s, target, s.dc, Options{})
			if err != nil {
				t.Errorf("%s, %s: decrypt: %v", name, how, err)
			} else if decrypted.Target.Digest != test.target.Digest || decrypted.Target.MediaType != test.target.MediaType {
				t.Errorf("%s, %s: came back as\n%s\nwas\n%s\nencrypted\n%s", name, how, s.get(decrypted.Target), s.get(test.target), s.get(target))
			}
		}
	}
}

// TestSubjectInSteps decrypts a manifest before its subject, and an index before what
// its attestation is about.
func TestSubjectInSteps(t *testing.T) {
	s := newStore(t)
	a, b := s.put(ocispec.MediaTypeImageLayerGzip, "layer a"), s.put(ocispec.MediaTypeImageLayerGzip, "layer b")
	subject := s.manifest(ociManifest, entry(a)+","+entry(b), "")
	escaped := `\u0073` + subject.Digest.String()[1:]
	signature := s.manifest(ociManifest, entry(b), `,"subject":`+strings.Replace(entry(subject), subject.Digest.String(), escaped, 1))
	sbom := s.manifest(ociManifest, entry(s.put("application/vnd.in-toto+json", "sbom")), "")
	attestation := strings.TrimSuffix(entry(sbom), "}") + `,"annotations":{"vnd.docker.reference.digest":"` + escaped + `","vnd.docker.reference.type":"attestation-manifest"}}`
	target := s.put(ociIndex, `{"manifests":[`+entry(subject)+`,`+entry(signature)+`,`+entry(s.put(ociIndex, `{"manifests":[`+attestation+`]}`))+`]}`)
	result, err := Encrypt(s.ctx, s, target, s.ec, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, layers := range [][]int{{0}, {-1}} {
		if result, err = Decrypt(s.ctx, s, result.Target, s.dc, Options{Layers: layers}); err != nil {
			t.Fatal(err)
		}
	}
	if result.Target.Digest != target.Digest {
		t.Errorf("came back as\n%s\nwas\n%s", s.get(result.Target), s.get(target))
	}
}

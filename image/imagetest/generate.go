package imagetest

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	ociIndex       = ocispec.MediaTypeImageIndex
	ociManifest    = ocispec.MediaTypeImageManifest
	ociConfig      = ocispec.MediaTypeImageConfig
	dockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
	oldArtifact    = "application/vnd.oci.artifact.manifest.v1+json"
)

// maxDepth is how deep indexes stand in each other.
const maxDepth = 4

type generator struct {
	*rand.Rand
	size   int
	image  *Image
	budget int // of manifests

	contents  []reference // that another reference may name too
	manifests []reference
}

// reference is how a document refers to something.
type reference struct {
	mediaType string
	digest    digest.Digest
	size      int
	platform  *ocispec.Platform
	plain     []byte // of a layer, uncompressed
	more      object // further members
}

func (r reference) descriptor() ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: r.mediaType, Digest: r.digest, Size: int64(r.size), Platform: r.platform}
}

func (g *generator) chance(p float64) bool { return g.Float64() < p }

func pick[T any](g *generator, list []T) T { return list[g.IntN(len(list))] }

// add adds a blob to the image.
func (g *generator) add(kind Kind, mediaType string, b, marker []byte, children ...reference) reference {
	d := digest.FromBytes(b)
	had := g.image.Blobs[d]
	if had == nil {
		had = &Blob{Kind: kind, MediaType: mediaType, Bytes: b, Marker: marker}
		g.image.Blobs[d] = had
	}
	if had.Children == nil {
		for _, c := range children {
			had.Children = append(had.Children, c.descriptor())
		}
	}
	return reference{mediaType: mediaType, digest: d, size: len(b)}
}

// absent makes a part absent, unless something needs its bytes to stay.
func (g *generator) absent(r reference, why string) {
	g.image.Blobs[r.digest].Absent = true
	g.image.Features[why] = true
}

// top makes the image's own document.
func (g *generator) top() reference {
	if g.size > 1 && g.chance(0.75) {
		return g.index(0)
	}
	return g.manifest(0, nil)
}

func (g *generator) style() style {
	return pick(g, []style{compact, compact, indented, odd})
}

// element writes a reference as an element of a document's list.
func (g *generator) element(r reference) object {
	o := object{{"mediaType", r.mediaType}, {"digest", r.digest.String()}, {"size", r.size}}
	if r.platform != nil {
		p := object{{"architecture", r.platform.Architecture}, {"os", r.platform.OS}}
		if r.platform.Variant != "" {
			p = append(p, member{"variant", r.platform.Variant})
		}
		o = append(o, member{"platform", p})
	}
	o = append(o, r.more...)
	if g.chance(0.2) {
		g.Shuffle(len(o), func(i, j int) { o[i], o[j] = o[j], o[i] })
	}
	return o
}

func (g *generator) elements(list []reference) []object {
	out := make([]object, len(list))
	for i, r := range list {
		out[i] = g.element(r)
	}
	return out
}

// annotations returns annotations of a document or a descriptor, or nothing.
func (g *generator) annotations(stale bool) object {
	switch {
	case g.chance(0.6):
		return nil
	case g.chance(0.1):
		return object{{"annotations", object{}}}
	case g.chance(0.1):
		return object{{"annotations", json.RawMessage("null")}}
	}
	o := object{{"com.example.kept", "v<&>é\n"}}
	if g.chance(0.3) {
		o = append(o, member{"", ""}, member{"ключ/\u2028", strings.Repeat("x", g.IntN(200))})
	}
	if stale && g.chance(0.1) {
		g.image.Features["stale annotations of encryption"] = true
		o = append(o, member{"org.opencontainers.image.enc.keys.jwe", "c3RhbGU="})
	}
	return object{{"annotations", o}}
}

// layer makes a layer or another part of a manifest of one of the types, or takes
// one that is somewhere already, sometimes under another type.
func (g *generator) layer(types []string) reference {
	mediaType := pick(g, types)
	if len(g.contents) > 0 && g.chance(0.2) {
		r := pick(g, g.contents)
		if g.chance(0.4) {
			if r.mediaType != mediaType {
				g.image.Features["same content, different types"] = true
			}
			r.mediaType = mediaType
		}
		r.more = g.annotations(true)
		return r
	}
	b, marker, plain := g.content(mediaType)
	r := g.add(Content, mediaType, b, marker)
	r.plain = plain
	if r.plain == nil {
		r.plain = b
	}
	g.contents = append(g.contents, r)
	r.more = g.annotations(true)
	return r
}

var architectures = []ocispec.Platform{
	{OS: "linux", Architecture: "amd64"}, {OS: "linux", Architecture: "arm64", Variant: "v8"}, {OS: "linux", Architecture: "s390x"},
	{OS: "linux", Architecture: "arm", Variant: "v7"}, {OS: "windows", Architecture: "amd64"},
}

// manifest makes an image's manifest, or an artifact's.
func (g *generator) manifest(depth int, platform *ocispec.Platform) reference {
	g.budget--
	switch {
	case g.chance(0.15):
		return g.artifact()
	case g.chance(0.25):
		return g.of(depth, platform, dockerManifest, dockerConfig, dockers)
	}
	return g.of(depth, platform, ociManifest, ociConfig, ordinary)
}

// of makes an image's manifest of a type.
func (g *generator) of(depth int, platform *ocispec.Platform, mediaType, configType string, types []string) reference {
	var layers []reference
	for range g.IntN(min(g.size, 4) + 2) {
		switch {
		case g.chance(0.07):
			r := g.layer(foreigns)
			g.image.Features["foreign layer"] = true
			r.more = append(r.more, member{"urls", []string{"https://example.com/" + r.digest.Encoded()}})
			if g.chance(0.6) {
				g.absent(r, "absent foreign layer")
			}
			layers = append(layers, r)
		case g.chance(0.1):
			g.image.Features["unusual layer"] = true
			layers = append(layers, g.layer(unusual))
		case g.chance(0.03) && mediaType == ociManifest:
			layers = append(layers, g.layer([]string{inToto}))
		default:
			layers = append(layers, g.layer(types))
		}
	}
	if len(layers) > 0 && g.chance(0.1) {
		layers = append(layers, pick(g, layers))
	}
	if len(layers) > 0 && g.chance(0.03) {
		i := g.IntN(len(layers))
		if b := g.image.Blobs[layers[i].digest].Bytes; len(b) > 0 && len(b) < 8000 {
			g.image.Features["inlined layer"] = true
			layers[i].more = append(slices.Clone(layers[i].more), member{"data", b})
		}
	}
	if len(layers) > 0 && g.chance(0.05) {
		g.absent(pick(g, layers), "absent layer")
	}
	ids := make([]string, len(layers))
	for i, l := range layers {
		ids[i] = digest.FromBytes(l.plain).String()
	}
	configuration := object{{"architecture", "amd64"}, {"os", "linux"}}
	if platform != nil {
		configuration = object{{"architecture", platform.Architecture}, {"os", platform.OS}}
	}
	configuration = append(configuration, member{"config", object{{"Env", []string{fmt.Sprintf("N=%d", g.Uint32())}}}}, member{"rootfs", object{{"type", "layers"}, {"diff_ids", ids}}})
	config := g.add(Config, configType, g.text(configuration, compact), nil)
	if g.chance(0.03) {
		g.absent(config, "absent config")
	}
	return g.document(mediaType, "layers", config, layers, mediaType == dockerManifest)
}

// artifact makes the manifest of an artifact.
func (g *generator) artifact() reference {
	g.image.Features["artifact"] = true
	types := []string{"application/vnd.cncf.helm.config.v1+json", "application/vnd.cncf.model.config.v1+json", "application/vnd.oci.empty.v1+json", "application/vnd.wasm.config.v0+json"}
	configType := pick(g, types)
	b := []byte("{}")
	if configType != ocispec.MediaTypeEmptyJSON {
		b = fmt.Appendf(nil, `{"name":"n%d"}`, g.Uint32())
	}
	config := g.add(Config, configType, b, nil)
	if g.chance(0.3) {
		g.image.Features["inlined config"] = true
		config.more = object{{"data", b}}
	}
	var layers []reference
	for range 1 + g.IntN(3) {
		layers = append(layers, g.layer(artifacts[configType]))
	}
	return g.document(ociManifest, "layers", config, layers, false, member{"artifactType", "application/vnd.example.artifact"})
}

// document makes a manifest, or an index where config is not set.
func (g *generator) document(mediaType, list string, config reference, children []reference, named bool, more ...member) reference {
	o := object{{"schemaVersion", 2}}
	if named || g.chance(0.7) {
		o = append(o, member{"mediaType", mediaType})
	}
	o = append(o, more...)
	all := children
	if config.digest != "" {
		o = append(o, member{"config", g.element(config)})
		all = append([]reference{config}, children...)
	}
	o = append(o, member{list, g.elements(children)})
	o = append(o, g.annotations(false)...)
	if g.chance(0.1) {
		o = append(o, member{"x-unknown", json.RawMessage(`[1.50e2,{"layers":[]},null]`)})
	}
	if len(g.manifests) > 0 && config.digest != "" && !named && g.chance(0.1) {
		g.image.Features["subject"] = true
		o = append(o, member{"subject", g.element(bare(pick(g, g.manifests)))})
	}
	if g.chance(0.2) {
		g.Shuffle(len(o), func(i, j int) { o[i], o[j] = o[j], o[i] })
	}
	return g.add(Document, mediaType, g.text(o, g.style()), nil, all...)
}

func bare(r reference) reference {
	r.platform, r.more = nil, nil
	return r
}

// index makes an index, or Docker's manifest list.
func (g *generator) index(depth int) reference {
	g.budget--
	if g.chance(0.2) {
		return g.dockerList()
	}
	var entries []reference
	for range 1 + g.IntN(min(g.size, 5)) {
		if g.budget <= 0 && len(entries) > 0 {
			break
		}
		entries = append(entries, g.entries(depth)...)
	}
	for i, e := range entries {
		if e.more == nil && !slices.ContainsFunc(e.more, func(m member) bool { return m.key == "annotations" }) {
			entries[i].more = g.annotations(false)
		}
		b := g.image.Blobs[e.digest]
		switch {
		case b.Kind == Document && g.chance(0.03) && len(b.Bytes) < 8000:
			g.image.Features["inlined manifest"] = true
			entries[i].more = append(slices.Clone(entries[i].more), member{"data", b.Bytes})
		case b.Kind == Document && g.chance(0.1):
			g.absent(e, "absent manifest")
		}
	}
	if g.chance(0.1) {
		entries = append(entries, pick(g, entries))
	}
	return g.document(ociIndex, "manifests", reference{}, entries, false)
}

// entries makes one entry of an index, and perhaps its attestation.
func (g *generator) entries(depth int) []reference {
	switch {
	case depth < maxDepth && g.size > 2 && g.chance(0.2):
		g.image.Features["nested index"] = true
		return []reference{g.index(depth + 1)}
	case g.chance(0.04):
		g.image.Features["entry of another type"] = true
		return []reference{g.layer([]string{"application/vnd.other", gzipLayer, "application/vnd.buildkit.cacheconfig.v0"})}
	case g.chance(0.03):
		return []reference{g.oldArtifact()}
	case len(g.manifests) > 0 && g.chance(0.08):
		g.image.Features["manifest in several places"] = true
		r := pick(g, g.manifests)
		p := pick(g, architectures)
		r.platform = &p
		return []reference{r}
	}
	p := pick(g, architectures)
	r := g.manifest(depth, &p)
	if g.chance(0.85) {
		r.platform = &p
	}
	g.manifests = append(g.manifests, r)
	if g.chance(0.03) {
		g.image.Features["unusual manifest type"] = true
		r.mediaType = pick(g, []string{ociManifest + "; charset=utf-8", strings.ToUpper(ociManifest), "", "application/json", dockerManifest})
		return []reference{r}
	}
	if g.chance(0.25) {
		return []reference{r, g.attestation(r)}
	}
	return []reference{r}
}

// attestation makes what BuildKit attaches to an image.
func (g *generator) attestation(of reference) reference {
	g.image.Features["attestation"] = true
	var statements []reference
	for range 1 + g.IntN(2) {
		statements = append(statements, g.layer([]string{inToto}))
	}
	config := g.add(Config, ociConfig, g.text(object{{"architecture", "unknown"}, {"os", "unknown"}, {"n", g.Uint32()}}, compact), nil)
	r := g.document(ociManifest, "layers", config, statements, false)
	r.platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
	r.more = object{{"annotations", object{{"vnd.docker.reference.digest", of.digest.String()}, {"vnd.docker.reference.type", "attestation-manifest"}}}}
	return r
}

// oldArtifact makes a manifest of a type that was dropped before OCI 1.1, whose
// parts are "blobs".
func (g *generator) oldArtifact() reference {
	g.image.Features["old artifact"] = true
	parts := []reference{g.layer([]string{"application/spdx+json", "text/plain"})}
	return g.document(oldArtifact, "blobs", reference{}, parts, true)
}

// dockerList makes Docker's manifest list.
func (g *generator) dockerList() reference {
	g.image.Features["manifest list"] = true
	var entries []reference
	for range 1 + g.IntN(min(g.size, 3)) {
		p := pick(g, architectures)
		r := g.of(1, &p, dockerManifest, dockerConfig, dockers)
		r.platform = &p
		g.budget--
		g.manifests = append(g.manifests, r)
		if g.chance(0.1) {
			g.absent(r, "absent manifest")
		}
		entries = append(entries, r)
	}
	return g.document(dockerList, "manifests", reference{}, entries, true)
}

package image

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// export is what somebody has who was given an image: all blobs that its documents
// refer to in any way, as text to search.
type export struct {
	blobs     map[digest.Digest][]byte
	documents map[digest.Digest]bool
	encrypted []ocispec.Descriptor // layers whose annotations have keys
	text      bytes.Buffer         // of documents, and what is encoded in their strings
	raw       bytes.Buffer         // of the other blobs
}

// exported reads an image as anybody would who does not know which members count:
// whatever looks like a descriptor is followed.
func exported(s *store, target ocispec.Descriptor) *export {
	e := &export{blobs: make(map[digest.Digest][]byte), documents: make(map[digest.Digest]bool)}
	e.follow(s, target.Digest, true)
	return e
}

func (e *export) follow(s *store, d digest.Digest, document bool) {
	if _, ok := e.blobs[d]; ok && (!document || e.documents[d]) {
		return
	}
	b, err := content.ReadBlob(s.ctx, s, ocispec.Descriptor{Digest: d})
	if err != nil {
		return
	}
	e.blobs[d] = b
	var v any
	if document && json.Unmarshal(b, &v) == nil {
		e.documents[d] = true
		e.text.Write(b)
		e.text.WriteByte('\n')
		e.value(s, v)
		return
	}
	e.raw.Write(b)
	e.raw.WriteByte('\n')
}

func (e *export) value(s *store, v any) {
	switch v := v.(type) {
	case []any:
		for _, element := range v {
			e.value(s, element)
		}
	case map[string]any:
		for key, member := range v {
			e.text.WriteString(key + "\n")
			if config, ok := member.(map[string]any); ok && key == "config" {
				// It names the diff IDs of layers, which is their digest if they
				// are not compressed.
				d, _ := config["digest"].(string)
				e.follow(s, digest.Digest(d), false)
				e.strings(config, 0)
				continue
			}
			if key == "subject" {
				e.strings(member, 0) // it is not part of the image
				continue
			}
			e.value(s, member)
		}
		if d, ok := v["digest"].(string); ok && digest.Digest(d).Validate() == nil {
			text, _ := json.Marshal(v)
			var desc ocispec.Descriptor
			if json.Unmarshal(text, &desc) == nil {
				if _, sealed := desc.Annotations["org.opencontainers.image.enc.pubopts"]; sealed && strings.HasSuffix(desc.MediaType, "+encrypted") {
					e.encrypted = append(e.encrypted, desc)
				}
			}
			e.follow(s, digest.Digest(d), !strings.HasSuffix(desc.MediaType, "+encrypted"))
		}
	case string:
		e.decode(v, 0)
	}
}

// decode adds a string, and what it encodes.
func (e *export) decode(text string, depth int) {
	e.text.WriteString(text + "\n")
	if depth > 4 {
		return
	}
	var v any
	if strings.ContainsAny(text, `{["`) && json.Unmarshal([]byte(text), &v) == nil {
		e.strings(v, depth+1)
	}
	for part := range strings.SplitSeq(text, ",") {
		if b, err := base64.StdEncoding.DecodeString(part); err == nil && len(b) > 8 {
			e.decode(string(b), depth+1)
		}
	}
}

func (e *export) strings(v any, depth int) {
	switch v := v.(type) {
	case []any:
		for _, element := range v {
			e.strings(element, depth)
		}
	case map[string]any:
		for key, member := range v {
			e.decode(key, depth)
			e.strings(member, depth)
		}
	case string:
		e.decode(v, depth)
	}
}

// holds reports whether the bytes of a blob with that marker can be read.
func (e *export) holds(d digest.Digest, marker []byte) bool {
	if _, ok := e.blobs[d]; ok {
		return true
	}
	if len(marker) == 0 {
		return false
	}
	for _, all := range [][]byte{e.text.Bytes(), e.raw.Bytes()} {
		if slices.ContainsFunc(encodings(marker), func(b []byte) bool { return bytes.Contains(all, b) }) {
			return true
		}
	}
	return false
}

// mentions reports whether a document says a digest.
func (e *export) mentions(d digest.Digest) bool {
	b, err := hex.DecodeString(d.Encoded())
	return err != nil || slices.ContainsFunc(append(encodings(b), b), func(b []byte) bool { return bytes.Contains(e.text.Bytes(), b) })
}

// encodings are the ways in which bytes may stand in a text: as they are, in
// hexadecimal, and in base64 after 0, 1 or 2 others.
func encodings(b []byte) [][]byte {
	list := [][]byte{b, []byte(hex.EncodeToString(b))}
	for _, enc := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
		for shift := range 3 {
			text := enc.EncodeToString(append(make([]byte, shift), b...))
			// The first and the last characters depend on what is beside them.
			list = append(list, []byte(text[(shift*8+5)/6:len(text)-1]))
		}
	}
	return list
}

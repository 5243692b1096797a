package processor

import (
	"encoding/base64"
	"encoding/json"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxKEKs bounds the IDs of KEKs that [KEKs] returns, in bytes: an image may
// name any number.
const maxKEKs = 300

// KEKs returns the IDs of the KEKs that a layer's annotations name, each once, with commas
// between them, for logs. Where pilot wrapped for several KEKs at once, a value is an
// array.
func KEKs(layer ocispec.Descriptor) string {
	type annotation struct {
		KEKID string `json:"kekId"`
	}
	var ids []string
	for name, value := range layer.Annotations {
		if !strings.HasPrefix(name, annotationKeysPrefix+providerScheme) {
			continue
		}
		for text := range strings.SplitSeq(value, ",") {
			b, _ := base64.StdEncoding.DecodeString(text)
			list := make([]annotation, 1)
			if json.Unmarshal(b, &list[0]) != nil && json.Unmarshal(b, &list) != nil {
				continue // another key provider's
			}
			for _, a := range list {
				if a.KEKID != "" {
					ids = append(ids, a.KEKID)
				}
			}
		}
	}
	slices.Sort(ids)
	keks := strings.Join(slices.Compact(ids), ",")
	if len(keks) > maxKEKs {
		keks = strings.ToValidUTF8(keks[:maxKEKs], "") + "…"
	}
	return keks
}

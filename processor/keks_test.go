package processor

import (
	"encoding/base64"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestKEKsLogged checks which KEKs the log names for a layer.
func TestKEKsLogged(t *testing.T) {
	const pilot, other = AnnotationPrefix + "keys.provider.pilot", AnnotationPrefix + "keys.provider.other"
	b64 := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	one, two := b64(`{"kekId":"b"}`), b64(`[{"kekId":"c"},{"kekId":"a"}]`)
	for name, c := range map[string]struct {
		annotations map[string]string
		want        string
	}{
		"one KEK":           {map[string]string{pilot: one}, "b"},
		"two at once":       {map[string]string{pilot: two}, "a,c"},
		"one, and then two": {map[string]string{pilot: one + "," + two + "," + one}, "a,b,c"},
		"unnamed":           {map[string]string{pilot: b64(`{}`)}, ""},
		"another provider":  {map[string]string{other: b64("\x00") + ",%," + one, AnnotationPrefix + "keys.jwe": two}, "b"},
		"a long one":        {map[string]string{pilot: b64(`{"kekId":"` + strings.Repeat("é", maxKEKs) + `"}`)}, strings.Repeat("é", maxKEKs/2) + "…"},
		"none":              {nil, ""},
	} {
		if got := KEKs(ocispec.Descriptor{Annotations: c.annotations}); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

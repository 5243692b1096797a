package imagekeys

import (
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/layerkeys"
	"github.com/ctrlplane/pilot/internal/mustencrypt"
	"github.com/ctrlplane/pilot/internal/openedby"
)

// TestRuleCountsWhatSomebodyHasWrapped has one image's layer, and what is known of its diff ID.
func TestRuleCountsWhatSomebodyHasWrapped(t *testing.T) {
	t.Parallel()
	own, other := digest.FromString("own"), digest.FromString("other")
	rule := mustencrypt.Rule{Images: []string{"**"}, KEKs: []string{"team-a"}}
	opened := func(blob digest.Digest, basis layerkeys.Basis, kek string, vouches bool) layerkeys.Blob {
		return layerkeys.Opened(blob, basis, openedby.Opener{KEK: kek, Version: 1, Vouches: vouches}, []byte(blob))
	}
	for name, test := range map[string]struct {
		known []layerkeys.Blob
		want  bool
	}{
		"decrypted":                               {[]layerkeys.Blob{opened(own, layerkeys.Decrypted, "team-a", true)}, true},
		"decrypted, of another image":             {[]layerkeys.Blob{opened(other, layerkeys.Decrypted, "team-a", true)}, true},
		"decrypted, and other content is wrapped": {[]layerkeys.Blob{opened(own, layerkeys.Decrypted, "team-a", false)}, false},
		"decrypted, for another KEK":              {[]layerkeys.Blob{opened(own, layerkeys.Decrypted, "team-b", true)}, false},
		"claimed":                                 {[]layerkeys.Blob{opened(own, layerkeys.Claimed, "team-a", true)}, false},
		"mounted":                                 {[]layerkeys.Blob{opened(own, layerkeys.Sealed, "team-a", true)}, true},
		"mounted, and not wrapped":                {[]layerkeys.Blob{opened(own, layerkeys.Sealed, "team-a", false)}, false},
		"mounted, not wrapped, and another is":    {[]layerkeys.Blob{opened(other, layerkeys.Decrypted, "team-a", true), opened(own, layerkeys.Sealed, "team-a", false)}, false},
	} {
		got := isFor(rule, layerkeys.Layer{Blobs: test.known}, []layer{{desc: ocispec.Descriptor{Digest: own}}})
		if got != test.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

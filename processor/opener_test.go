package processor

import (
	"encoding/base64"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// TestClaimOfWhatAnybodyCanWrapIsPublic reads annotations, of which nothing is proven.
func TestClaimOfWhatAnybodyCanWrapIsPublic(t *testing.T) {
	fipstest.Refused(t, fipstest.HPKE)
	const scheme = "provider.pilot"
	for annotation, want := range map[string]Opener{
		`{"method":"A256GCMKW","kekId":"a","kekVersion":2,"iv":"","wrappedKey":""}`:                                                            {Scheme: scheme, KEK: "a", Version: 2},
		`{"method":"copilot","kekId":"a","kekVersion":2,"wrappedKey":""}`:                                                                      {Scheme: scheme, KEK: "a", Version: 2},
		`{"method":"AES-GCM","iv":"","wrappedKey":""}`:                                                                                         {Scheme: scheme},
		`{"method":"HPKE-MLKEM768-X25519-HKDF-SHA256-A256GCM","kekId":"a","kekVersion":2,"enc":"","wrappedKey":""}`:                            {Scheme: scheme, KEK: "a", Version: 2, Public: true},
		`{"method":"of a later version","kekId":"a","kekVersion":2}`:                                                                           {Scheme: scheme, KEK: "a", Version: 2, Public: true},
		`{"kid":"kbs+external:///copilot/a/2","wrap_type":"A256GCM","iv":"AAAAAAAAAAAAAAAA","wrapped_data":"` + strings.Repeat("A", 44) + `"}`: {Scheme: scheme, KEK: "a", Version: 2, Public: true},
		`{"kid":"kbs:///default/key/a","wrap_type":"A256GCM","iv":"AAAAAAAAAAAAAAAA","wrapped_data":"` + strings.Repeat("A", 44) + `"}`:        {Scheme: scheme},
		`{"method":"age","recipient":"age1team","wrappedKey":""}`:                                                                              {Scheme: scheme},
	} {
		desc := ocispec.Descriptor{Annotations: map[string]string{annotationKeysPrefix + scheme: base64.StdEncoding.EncodeToString([]byte(annotation))}}
		if got := ClaimedOpeners(desc); !slices.Equal(got, []Opener{want}) {
			t.Errorf("%s: %+v, want %+v", annotation, got, want)
		}
	}
}

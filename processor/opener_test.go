package processor

import (
	"context"
	"encoding/base64"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/ctrlplane/pilot/internal/openedby"
)

// emptyKEK unwraps with KEK team-a what is empty, and with a key that is no KEK all else.
type emptyKEK struct{}

func (emptyKEK) WrapKey(_ context.Context, _ [][]byte, layerKey []byte) ([]byte, error) {
	return append([]byte("key "), layerKey...), nil
}

func (emptyKEK) UnwrapKey(ctx context.Context, _ [][]byte, annotation []byte) ([]byte, error) {
	if string(annotation) == "empty" {
		openedby.Report(ctx, openedby.KEK{ID: "team-a", Version: 1})
		return nil, nil
	}
	return slices.Clone(annotation[len("key "):]), nil
}

// TestOpenerIsThatOfTheRecipientThatGaveTheKey puts before a recipient another, which a KEK
// unwraps and which holds no layer key.
func TestOpenerIsThatOfTheRecipientThatGaveTheKey(t *testing.T) {
	_, k := encrypt(t, []byte("plain"))
	annotations := wrapped(t, k, Recipients{Keys: withProvider("test", emptyKEK{}), Parameters: map[string][][]byte{"test": {[]byte("a key")}}}, nil)
	const scheme = "provider.test"
	id := annotationKeysPrefix + scheme
	annotations[id] = base64.StdEncoding.EncodeToString([]byte("empty")) + "," + annotations[id]
	got, err := Unwrap(t.Context(), withProvider("test", emptyKEK{}), ocispec.Descriptor{Annotations: annotations})
	if err != nil {
		t.Fatal(err)
	}
	if want := (Opener{Scheme: scheme, Digest: k.Digest}); got.OpenedBy != want {
		t.Errorf("opened by %+v, want %+v", got.OpenedBy, want)
	}
}

// TestOpenersNeedNoKeyProviderThatIsNotThere has a layer for nodes and for the guests of
// Confidential Containers, whose key provider a node has not.
func TestOpenersNeedNoKeyProviderThatIsNotThere(t *testing.T) {
	_, k := encrypt(t, []byte("plain"))
	keys := withProvider("test", emptyKEK{})
	annotations := wrapped(t, k, Recipients{Keys: keys, Parameters: map[string][][]byte{"test": {[]byte("a key")}}}, nil)
	annotations[annotationKeysPrefix+"provider.other"] = annotations[annotationKeysPrefix+"provider.test"]
	openers, complete := Openers(t.Context(), keys, ocispec.Descriptor{Annotations: annotations}, k.Equal)
	if len(openers) != 1 || !complete {
		t.Errorf("%+v, complete: %v", openers, complete)
	}
}

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

package processor

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/layerbudget"
	"github.com/ctrlplane/pilot/internal/openedby"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// Opener is what has unwrapped a layer key.
type Opener = openedby.Opener

func newOpener(scheme string, kek openedby.KEK) Opener {
	o := Opener{Scheme: scheme, KEK: kek.ID, Version: kek.Version}
	switch kek.Method {
	case wireformat.MethodA256GCMKW, wireformat.MethodCopilot, wireformat.MethodAESGCM:
	default: // HPKE, A256GCM, and those of later versions
		o.Public = kek.ID != ""
	}
	return o
}

// errNotConfigured is the error of a key provider that is not there.
var errNotConfigured = errors.New("is not configured")

// Openers unwraps the key of the layer that desc describes with each of its recipients, at
// most [MaxWrappedKeys], and returns those that give a key which is accepted. Which others
// an annotation names proves nothing: anybody can add some. If some key provider did not
// answer, complete is false.
func Openers(ctx context.Context, keys Keys, desc ocispec.Descriptor, accept func(*LayerKey) bool) (openers []Opener, complete bool) {
	ctx = layerbudget.With(ctx)
	left, complete := MaxWrappedKeys, true
	for _, scheme := range wrappedWith(desc) {
		for wrapped := range strings.SplitSeq(desc.Annotations[annotationKeysPrefix+scheme], ",") {
			for _, one := range recipientsOf(wrapped) {
				if left <= 0 {
					return openers, complete
				}
				key, err := unwrapWith(ctx, keys, scheme, one, desc.Annotations[annotationPubOpts], &left)
				if err != nil {
					complete = complete && ctx.Err() == nil && (errors.Is(err, ErrDenied) || errors.Is(err, errNotConfigured))
					continue
				}
				if accept(key) {
					openers = append(openers, key.OpenedBy)
				}
				key.Clear()
			}
		}
	}
	return openers, complete
}

// recipientsOf returns the recipients of one wrapped key, in base64. Where pilot wrapped for
// several KEKs at once, it is an array of JSON.
func recipientsOf(wrapped string) []string {
	b, err := base64.StdEncoding.DecodeString(wrapped)
	var list []json.RawMessage
	if err != nil || json.Unmarshal(b, &list) != nil || len(list) == 0 {
		return []string{wrapped}
	}
	all := make([]string, len(list))
	for i, one := range list {
		all[i] = base64.StdEncoding.EncodeToString(one)
	}
	return all
}

// Fingerprint returns 32 bytes by which a layer key can be recognized, and from which nobody
// can compute it.
func (k *LayerKey) Fingerprint() []byte { return k.Derive("pilot layer record") }

// ClaimedOpeners returns what the annotations of a layer say can unwrap its key, of which
// nothing is proven, at most [MaxWrappedKeys].
func ClaimedOpeners(desc ocispec.Descriptor) (openers []Opener) {
	for _, scheme := range wrappedWith(desc) {
		for wrapped := range strings.SplitSeq(desc.Annotations[annotationKeysPrefix+scheme], ",") {
			for _, one := range recipientsOf(wrapped) {
				if len(openers) >= MaxWrappedKeys {
					return openers
				}
				openers = append(openers, newOpener(scheme, claimedKEK(scheme, one)))
			}
		}
	}
	return openers
}

// claimedKEK returns the KEK that a wrapped key names, in base64, if it is one of the broker's.
func claimedKEK(scheme, wrapped string) (kek openedby.KEK) {
	b, err := base64.StdEncoding.DecodeString(wrapped)
	if err != nil || !strings.HasPrefix(scheme, providerScheme) {
		return kek
	}
	if packet, err := wireformat.ParseCoCoPacket(b); err == nil {
		// Which KEK is behind another URI than copilot's is not known here.
		if id, version, ok := wireformat.ParsePluginKID(packet.KID); ok {
			kek = openedby.KEK{ID: id, Version: version, Method: wireformat.MethodCoCo}
		}
		return kek
	}
	var a struct {
		Method     string `json:"method"`
		KEKID      string `json:"kekId"`
		KEKVersion int    `json:"kekVersion"`
	}
	if json.Unmarshal(b, &a) == nil && wireformat.ValidateKEKID(a.KEKID) == nil {
		kek = openedby.KEK{ID: a.KEKID, Version: a.KEKVersion, Method: a.Method}
	}
	return kek
}

package image

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containers/ocicrypt/keywrap/pgp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/wireformat"
	"github.com/ctrlplane/pilot/processor"
)

const (
	keysPrefix     = processor.AnnotationPrefix + "keys."
	providerScheme = "provider."
)

// Recipient is someone for whom a layer key is wrapped, as far as the layer's
// annotations say.
type Recipient struct {
	// Scheme is how the key is wrapped, as in the annotation's name: jwe, pkcs7, pgp,
	// pkcs11, or provider. and the name of a key provider.
	Scheme string
	// KEK is the KEK's id, and Version its version, if the key provider writes
	// pilot's annotations and the annotation names them. It may be a recipient of age.
	KEK     string
	Version int
	// Original says that the annotation is one of pilot's in the original format,
	// which does not name the KEK. Only [Recipients] sets it.
	Original bool
	// KeyID is the key's id of a pgp recipient, such as 0x1f2e3d4c5b6a7988. Only
	// [Recipients] sets it.
	KeyID string
}

// Recipients returns for whom the key of an encrypted layer is wrapped, by scheme.
// It needs no key. The recipients of jwe, pkcs7 and pkcs11 can't be distinguished
// without one, so one stands for all of its scheme, and so does one of pgp if the
// annotation is damaged.
func Recipients(layer ocispec.Descriptor) []Recipient {
	var list []Recipient
	for _, scheme := range schemesOf(layer.Annotations) {
		annotation := layer.Annotations[keysPrefix+scheme]
		switch {
		case strings.HasPrefix(scheme, providerScheme):
			for _, v := range values(scheme, annotation) {
				for _, k := range v.keys {
					k.Original = k.json != nil && k.KEK == ""
					list = append(list, k.Recipient)
				}
			}
		case scheme == "pgp":
			ids, err := pgp.NewKeyWrapper().GetRecipients(annotation)
			if err != nil || len(ids) == 0 {
				ids = []string{""}
			}
			for _, id := range ids {
				list = append(list, Recipient{Scheme: scheme, KeyID: id})
			}
		default:
			list = append(list, Recipient{Scheme: scheme})
		}
	}
	return list
}

// ParseRecipient parses the name of recipients to remove: jwe, pkcs7, pgp,
// pkcs11 or provider:NAME for all of that kind, or provider:NAME:KEK.
func ParseRecipient(s string) (Recipient, error) {
	scheme, rest, _ := strings.Cut(s, ":")
	switch scheme {
	case "jwe", "pkcs7", "pgp", "pkcs11":
		if rest != "" {
			return Recipient{}, fmt.Errorf("%s: the %s recipients of a layer can't be distinguished: %s alone stands for all of them", s, scheme, scheme)
		}
		return Recipient{Scheme: scheme}, nil
	case "provider":
		name, kek, named := strings.Cut(rest, ":")
		if name == "" || named && kek == "" {
			break
		}
		return Recipient{Scheme: providerScheme + name, KEK: kek}, nil
	}
	return Recipient{}, fmt.Errorf("%.60q is not the name of recipients: use provider:NAME:KEK, or provider:NAME, jwe, pkcs7, pgp or pkcs11 for all of that kind", s)
}

// String returns what [ParseRecipient] reads, and the KEK's version after it as
// in provider:pilot:team-a@2.
func (r Recipient) String() string {
	s := r.Scheme
	if name, ok := strings.CutPrefix(s, providerScheme); ok {
		s = "provider:" + name
	}
	if r.KEK != "" {
		s += ":" + r.KEK
	}
	if r.Version != 0 {
		s += fmt.Sprintf("@%d", r.Version)
	}
	return s
}

// includes reports whether other is one of the recipients that r stands for.
func (r Recipient) includes(other Recipient) bool {
	return r.Scheme == other.Scheme && (r.KEK == "" || r.KEK == other.KEK)
}

// wrapped is a layer key wrapped for one recipient.
type wrapped struct {
	Recipient
	json   []byte // pilot's annotation; nil if another's
	method string // of it
	err    error  // why it can't be read, if it seems to be pilot's
}

// unwrapFrom unwraps the layer key of desc from k alone, which is pilot's.
func unwrapFrom(ctx context.Context, k *wrapped, keys processor.Keys, desc ocispec.Descriptor) (*processor.LayerKey, error) {
	desc.Annotations = maps.Clone(desc.Annotations)
	maps.DeleteFunc(desc.Annotations, func(key, _ string) bool { return strings.HasPrefix(key, keysPrefix) })
	desc.Annotations[keysPrefix+k.Scheme] = base64.StdEncoding.EncodeToString(k.json)
	return processor.Unwrap(ctx, keys, desc)
}

// value is one of the values, in base64 and with commas between them, that an
// annotation of recipients has: a key wrapped for one recipient, or for several
// KEKs.
type value struct {
	text string // as it stands
	keys []wrapped
}

// values reads the annotation of a scheme.
func values(scheme, annotation string) []value {
	var list []value
	for text := range strings.SplitSeq(annotation, ",") {
		keys, err := pilots(scheme, text)
		if keys == nil {
			keys = []wrapped{{Recipient: Recipient{Scheme: scheme}, err: err}}
		}
		list = append(list, value{text, keys})
	}
	return list
}

// pilots returns the keys in a value of pilot's, or none if it is another's. It is
// an error if it seems to be pilot's and can't be read: it is damaged, or that of
// a later version.
func pilots(scheme, text string) ([]wrapped, error) {
	if !strings.HasPrefix(scheme, providerScheme) {
		return nil, nil
	}
	b, err := base64.StdEncoding.DecodeString(text)
	if err == nil {
		var annotations []wireformat.Annotation
		if annotations, err = wireformat.ParseAnnotation(b); err == nil {
			return separate(scheme, b, annotations)
		}
		if packet, bad := wireformat.ParseCoCoPacket(b); bad == nil && scheme == providerScheme+wireformat.CoCoProvider {
			return []wrapped{{Recipient: Recipient{Scheme: scheme, KEK: packet.KID}}}, nil
		}
	}
	if scheme == providerScheme+"pilot" || bytes.Contains(b, []byte(`"wrappedKey"`)) {
		return nil, err
	}
	return nil, nil
}

// separate returns the keys in the text of annotations, one or an array.
func separate(scheme string, text []byte, annotations []wireformat.Annotation) ([]wrapped, error) {
	texts := []json.RawMessage{text}
	if bytes.HasPrefix(bytes.TrimSpace(text), []byte("[")) {
		if err := json.Unmarshal(text, &texts); err != nil {
			return nil, err
		}
	}
	keys := make([]wrapped, len(annotations))
	for i, a := range annotations {
		keys[i] = wrapped{Recipient: Recipient{Scheme: scheme, KEK: cmp.Or(a.KEKID, a.Recipient), Version: a.KEKVersion}, json: texts[i], method: a.Method}
	}
	return keys, nil
}

// newValue returns the text of a value of pilot's.
func newValue(keys []wrapped) string {
	texts := make([]json.RawMessage, len(keys))
	for i, k := range keys {
		texts[i] = k.json
	}
	text := []byte(texts[0])
	if len(texts) > 1 {
		var err error
		if text, err = json.Marshal(texts); err != nil {
			panic(err) // each was parsed
		}
	}
	return base64.StdEncoding.EncodeToString(text)
}

// schemesOf returns the schemes that a layer's annotations have recipients of.
func schemesOf(annotations map[string]string) []string {
	var list []string
	for _, key := range slices.Sorted(maps.Keys(annotations)) {
		if scheme, ok := strings.CutPrefix(key, keysPrefix); ok && annotations[key] != "" {
			list = append(list, scheme)
		}
	}
	return list
}

// recipientsOf returns a recipient for each wrapped key in a layer's annotations.
func recipientsOf(annotations map[string]string) []Recipient {
	var list []Recipient
	for _, scheme := range schemesOf(annotations) {
		for _, v := range values(scheme, annotations[keysPrefix+scheme]) {
			for _, k := range v.keys {
				list = append(list, k.Recipient)
			}
		}
	}
	return list
}

// difference describes which recipients a layer lost and gained, or, if they are the same,
// those of the annotations that changed.
func difference(had, has []Recipient, changed map[string]string) string {
	gone := slices.DeleteFunc(slices.Clone(had), func(r Recipient) bool {
		i := slices.Index(has, r)
		if i >= 0 {
			has = slices.Delete(slices.Clone(has), i, i+1)
		}
		return i >= 0
	})
	switch {
	case len(gone) == 0 && len(has) == 0:
		again := joinRecipients(recipientsOf(changed))
		return again + " -> " + again
	case len(gone) == 0:
		return "+ " + joinRecipients(has)
	case len(has) == 0:
		return "- " + joinRecipients(gone)
	}
	return joinRecipients(gone) + " -> " + joinRecipients(has)
}

func joinRecipients(list []Recipient) string {
	texts := make([]string, len(list))
	for i, r := range list {
		texts[i] = r.String()
	}
	return strings.Join(texts, ", ")
}

package wireformat

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// CoCoProvider is the name of the key provider of Confidential Containers (CoCo) in the
// annotations of images: guests unwrap what is in
// org.opencontainers.image.enc.keys.provider.attestation-agent.
const CoCoProvider = "attestation-agent"

// MethodCoCo is the method of a [CoCoPacket], RFC 7518's A256GCM: AES-256-GCM with an IV of
// 12 bytes and no additional data.
const MethodCoCo = "A256GCM"

// CoCoPacket is a layer key in the form that the guests of Confidential Containers read: the
// AnnotationPacket of confidential-data-hub/docs/IMAGE_ENCRYPTION.md in
// github.com/confidential-containers/guest-components. Its fields of bytes are in standard
// base64. Nothing binds the wrapped key to its kid.
type CoCoPacket struct {
	// KID is the URI of the KEK in a Key Broker Service (KBS).
	KID string `json:"kid"`
	// WrappedData is the encrypted layer key with its 16-byte tag.
	WrappedData []byte `json:"wrapped_data"`
	// IV has 12 bytes.
	IV []byte `json:"iv"`
	// WrapType is A256GCM.
	WrapType string `json:"wrap_type"`
}

// IsCoCoPacket reports whether an annotation is a [CoCoPacket], perhaps a bad one: pilot's
// own have no kid.
func IsCoCoPacket(b []byte) bool {
	var v struct {
		KID json.RawMessage `json:"kid"`
	}
	return len(b) <= MaxAnnotation && json.Unmarshal(b, &v) == nil && v.KID != nil
}

// ParseCoCoPacket reads a packet. Like the guests, it ignores members that it does not know.
func ParseCoCoPacket(b []byte) (CoCoPacket, error) {
	var p struct {
		CoCoPacket
		Version  string `json:"version"`
		Provider string `json:"provider"`
	}
	if err := json.Unmarshal(b, &p); err != nil {
		return CoCoPacket{}, fmt.Errorf("annotation is not that of Confidential Containers: %.200s", err)
	}
	switch {
	case p.Provider != "" && p.Provider != "kbs":
		return CoCoPacket{}, fmt.Errorf("annotation of Confidential Containers: its KEK is in the KMS %.40q, which the guests ask themselves, and not in a KBS", p.Provider)
	case p.Version != "" && p.Version != "0.1.0":
		return CoCoPacket{}, fmt.Errorf("annotation of Confidential Containers: version %.40q is not known to this version of pilot", p.Version)
	case p.WrapType == "A256CTR":
		return CoCoPacket{}, errors.New("annotation of Confidential Containers: wrap_type A256CTR has no authentication, and pilot does not unwrap it: encrypt the image again, with A256GCM")
	case p.WrapType != MethodCoCo:
		return CoCoPacket{}, fmt.Errorf("annotation of Confidential Containers: wrap_type %.40q is not %s", p.WrapType, MethodCoCo)
	case len(p.IV) != IVSize:
		return CoCoPacket{}, fmt.Errorf("annotation of Confidential Containers: iv of %d bytes, not %d", len(p.IV), IVSize)
	case len(p.WrappedData) <= TagSize || len(p.WrappedData) > MaxWrappedKey:
		return CoCoPacket{}, fmt.Errorf("annotation of Confidential Containers: wrapped_data of %d bytes, not %d to %d", len(p.WrappedData), TagSize+1, MaxWrappedKey)
	}
	kid, err := CanonicalKID(p.KID)
	if err != nil {
		return CoCoPacket{}, fmt.Errorf("annotation of Confidential Containers: %w", err)
	}
	p.KID = kid
	return p.CoCoPacket, nil
}

// KBSSegment is what a part of the path of a KBS resource looks like, as a regular
// expression: the KBS accepts no other.
const KBSSegment = `[A-Za-z0-9_-][A-Za-z0-9_.-]*`

var (
	kid        = regexp.MustCompile(`^kbs(\+[a-z0-9][a-z0-9.-]*)?://[A-Za-z0-9.:_\[\]-]*/` + KBSSegment + `/` + KBSSegment + `/` + KBSSegment + `$`)
	kbsSegment = regexp.MustCompile(`^` + KBSSegment + `$`)
)

// maxKID bounds a kid, in bytes.
const maxKID = 1024

// CanonicalKID returns the URI of a KBS resource, kbs:///REPOSITORY/TYPE/TAG or
// kbs+PLUGIN:///…, with what CoCo's own key provider leaves out: kbs:// before
// /REPOSITORY/TYPE/TAG.
func CanonicalKID(id string) (string, error) {
	if strings.HasPrefix(id, "/") {
		id = "kbs://" + id
	}
	if len(id) > maxKID || !kid.MatchString(id) {
		return "", fmt.Errorf("kid %.100q is not the URI of a KBS resource: kbs:///REPOSITORY/TYPE/TAG, of letters, digits, and ., _ and -", id)
	}
	return id, nil
}

// KBSAddress returns the address of the KBS in a canonical kid. It is empty in most.
func KBSAddress(kid string) string {
	_, rest, _ := strings.Cut(kid, "://")
	address, _, _ := strings.Cut(rest, "/")
	return address
}

// pluginKID begins the kids of KEKs that a KBS gets from copilot through its plugin for
// external programs, where copilot has to be the name of the backend.
const pluginKID = "kbs+external:///copilot/"

// PluginKID returns the kid of a version of a KEK that a KBS gets from copilot through "pilot
// kbs-plugin".
func PluginKID(kek string, version int) (string, error) {
	if !kbsSegment.MatchString(kek) {
		return "", fmt.Errorf("KEK %.60q can't be part of a KBS resource's URI, which has letters, digits, and _, - and .: map a URI to it in kbs-keks", kek)
	}
	if version < 1 {
		return "", fmt.Errorf("KEK %q has no versions at this broker, and what a KBS gets from copilot has: map a URI to it in kbs-keks", kek)
	}
	return pluginKID + kek + "/" + strconv.Itoa(version), nil
}

// ParsePluginKID returns the KEK and version of a kid of [PluginKID].
func ParsePluginKID(kid string) (kek string, version int, ok bool) {
	path, ok := strings.CutPrefix(kid, pluginKID)
	if !ok {
		return "", 0, false
	}
	return ParsePluginPath(strings.Split(path, "/"))
}

// ParsePluginPath returns the KEK and version of a KBS's request for what [PluginKID] names,
// from the parts of its path behind the name of the backend.
func ParsePluginPath(path []string) (kek string, version int, ok bool) {
	if len(path) != 2 || !kbsSegment.MatchString(path[0]) {
		return "", 0, false
	}
	version, err := strconv.Atoi(path[1])
	if err != nil || version < 1 || strconv.Itoa(version) != path[1] {
		return "", 0, false
	}
	return path[0], version, true
}

package keyprovider

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/ctrlplane/pilot/copilot/client"
)

// Format is a way to write down a wrapped layer key.
type Format string

const (
	// FormatA256GCMKW names the KEK and its version, so that a node needs
	// no parameter to unwrap. The KEK has 32 bytes. It is the default.
	FormatA256GCMKW Format = "A256GCMKW"
	// FormatCopilot has the broker wrap, and unwrap. It is what the default
	// comes to, too, for a KEK that the broker does not give out.
	FormatCopilot Format = "copilot"
	// FormatOriginal is that of the Java service that came before, for
	// nodes that still run it. It does not say which KEK it takes.
	FormatOriginal Format = "original"
)

func (f *Format) String() string { return string(*f) }

// UnmarshalText sets f to one of the formats above.
func (f *Format) UnmarshalText(b []byte) error {
	switch v := Format(b); v {
	case FormatA256GCMKW, FormatCopilot, FormatOriginal:
		*f = v
		return nil
	}
	return fmt.Errorf("%q is not an annotation format: use %s, %s or %s", b, FormatA256GCMKW, FormatCopilot, FormatOriginal)
}

// Methods, as they stand in an annotation.
const (
	methodA256GCMKW = "A256GCMKW" // RFC 7518, section 4.7
	methodCopilot   = "copilot"   // the broker's own
	methodAESGCM    = "AES-GCM"   // the original's
)

// Annotation is a layer key wrapped with one KEK: what WrapKey returns and
// what stands, in base64, in a layer's
// org.opencontainers.image.enc.keys.provider.pilot annotation.
type Annotation struct {
	// Method is A256GCMKW, copilot, or AES-GCM for the original's.
	Method string `json:"method"`
	// KEKID is the name of the KEK; the original's annotations lack it.
	KEKID string `json:"kekId,omitempty"`
	// KEKVersion is the KEK's version, counted from 1. It is 0 when the
	// broker has no versions, and in the original's annotations.
	KEKVersion int `json:"kekVersion,omitempty"`
	// IV has 12 bytes, and 16 in the original's. With the method copilot
	// there is none.
	IV []byte `json:"iv,omitempty"`
	// WrappedKey is the encrypted layer key with its 16-byte tag. With the
	// method copilot only the broker knows what it is.
	WrappedKey []byte `json:"wrappedKey"`
}

const (
	maxAnnotation = 1 << 20 // bytes
	maxRecipients = 64      // KEKs that can be named at once
)

// ParseAnnotation reads one annotation or a JSON array of them, as a layer has
// that was wrapped for several KEKs at once.
func ParseAnnotation(b []byte) ([]Annotation, error) {
	if len(b) > maxAnnotation {
		return nil, fmt.Errorf("annotation has more than %d bytes", maxAnnotation)
	}
	var list []Annotation
	if b = bytes.TrimSpace(b); len(b) > 0 && b[0] == '[' {
		if err := decodeStrict(b, &list); err != nil {
			return nil, fmt.Errorf("annotation is not pilot's: %.200s", err)
		}
		if len(list) == 0 || len(list) > maxRecipients {
			return nil, fmt.Errorf("annotation has %d recipients, not 1 to %d", len(list), maxRecipients)
		}
	} else {
		var a Annotation
		if err := decodeStrict(b, &a); err != nil {
			return nil, fmt.Errorf("annotation is not pilot's: %.200s", err)
		}
		list = []Annotation{a}
	}
	for _, a := range list {
		if err := a.validate(); err != nil {
			return nil, err
		}
	}
	return list, nil
}

func (a *Annotation) validate() error {
	ivSize := 12
	switch a.Method {
	case methodA256GCMKW:
		if err := ValidateKEKID(a.KEKID); err != nil {
			return fmt.Errorf("annotation: %w", err)
		}
		if a.KEKVersion < 0 {
			return fmt.Errorf("annotation: KEK version %d is negative", a.KEKVersion)
		}
	case methodCopilot:
		return a.validateCopilot()
	case methodAESGCM:
		if a.KEKID != "" || a.KEKVersion != 0 {
			return fmt.Errorf("annotation: method %s does not name a KEK", methodAESGCM)
		}
		ivSize = originalIVSize
	case "":
		return errors.New("annotation has no method")
	default:
		return fmt.Errorf("annotation: method %.40q is not known to this version of pilot", a.Method)
	}
	if len(a.IV) != ivSize {
		return fmt.Errorf("annotation: IV of %d bytes, not %d", len(a.IV), ivSize)
	}
	if len(a.WrappedKey) <= tagSize {
		return fmt.Errorf("annotation: wrapped key of %d bytes is too short", len(a.WrappedKey))
	}
	return nil
}

func (a *Annotation) validateCopilot() error {
	switch n := len(a.WrappedKey); {
	case a.KEKVersion < 1:
		return fmt.Errorf("annotation: KEK version %d is not from 1", a.KEKVersion)
	case a.IV != nil:
		return fmt.Errorf("annotation: method %s has no IV", methodCopilot)
	case n == 0 || n > client.MaxWrappedKey:
		return fmt.Errorf("annotation: wrapped key of %d bytes, not 1 to %d", n, client.MaxWrappedKey)
	}
	if err := ValidateKEKID(a.KEKID); err != nil {
		return fmt.Errorf("annotation: %w", err)
	}
	return nil
}

// additionalData binds the wrapped key to its method, KEK and version: their
// canonical JSON (RFC 8785). The original has none.
func (a *Annotation) additionalData() []byte {
	if a.Method == methodAESGCM {
		return nil
	}
	b, err := json.Marshal(struct {
		KEKID      string `json:"kekId"`
		KEKVersion int    `json:"kekVersion"`
		Method     string `json:"method"`
	}{a.KEKID, a.KEKVersion, a.Method})
	if err != nil {
		panic(err) // strings and an int
	}
	return b
}

// maxKEKID bounds a KEK's id, in bytes. The original's are the base64 of JSON.
const maxKEKID = 2048

// ValidateKEKID refuses what can't be a KEK's name, in an annotation or as a
// recipient. It accepts printable ASCII without spaces and without the three
// characters that encoding/json would escape where RFC 8785 does not.
func ValidateKEKID(id string) error {
	if id == "" {
		return errors.New("no KEK is named")
	}
	if len(id) > maxKEKID {
		return fmt.Errorf("KEK id of %d bytes is longer than %d", len(id), maxKEKID)
	}
	for _, c := range []byte(id) {
		if c <= ' ' || c > '~' || c == '<' || c == '>' || c == '&' {
			return fmt.Errorf("KEK id %.60q has a character that is not allowed: use printable ASCII without spaces, <, > and &", id)
		}
	}
	// It becomes part of the path of a URL.
	for element := range strings.SplitSeq(id, "/") {
		if element == "." || element == ".." {
			return fmt.Errorf("KEK id %.60q has a part that is only dots", id)
		}
	}
	return nil
}

// decodeStrict decodes exactly one JSON value without unknown fields.
func decodeStrict(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("something follows the JSON value")
	}
	return nil
}

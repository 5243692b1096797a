// Package wireformat holds what pilot, copilot and images have to agree on: pilot's
// annotation, what it binds a layer key to, the rule for KEK ids, and the problem types
// of copilot's API. docs/formats.md describes all of it.
package wireformat

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
)

// Methods of an [Annotation].
const (
	MethodA256GCMKW = "A256GCMKW" // RFC 7518, section 4.7
	MethodCopilot   = "copilot"   // the broker's own
	MethodAESGCM    = "AES-GCM"   // the original's
)

// Sizes in bytes.
const (
	KEKSize        = 32 // of a KEK for A256GCMKW
	IVSize         = 12 // of A256GCMKW
	OriginalIVSize = 16 // of AES-GCM as the original has it
	TagSize        = 16 // of AES-GCM

	// MaxAnnotation bounds all annotations of a layer for one key provider.
	MaxAnnotation = 1 << 20
	// MaxWrappedKey bounds what a broker makes of a layer key.
	MaxWrappedKey = 90 << 10
)

// MaxRecipients is how many KEKs one annotation can be for.
const MaxRecipients = 64

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

// ParseAnnotation reads one annotation or a JSON array of them, as a layer has
// that was wrapped for several KEKs at once.
func ParseAnnotation(b []byte) ([]Annotation, error) {
	if len(b) > MaxAnnotation {
		return nil, fmt.Errorf("annotation has more than %d bytes", MaxAnnotation)
	}
	var list []Annotation
	if b = bytes.TrimSpace(b); len(b) > 0 && b[0] == '[' {
		if err := decodeStrict(b, &list); err != nil {
			return nil, fmt.Errorf("annotation is not pilot's: %.200s", err)
		}
		if len(list) == 0 || len(list) > MaxRecipients {
			return nil, fmt.Errorf("annotation has %d recipients, not 1 to %d", len(list), MaxRecipients)
		}
	} else {
		a, ok := parseQuick(b)
		if !ok {
			a = Annotation{}
			if err := decodeStrict(b, &a); err != nil {
				return nil, fmt.Errorf("annotation is not pilot's: %.200s", err)
			}
		}
		list = []Annotation{a}
	}
	for _, a := range list {
		if err := a.Validate(); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// Validate reports what is wrong with an annotation.
func (a *Annotation) Validate() error {
	ivSize := IVSize
	switch a.Method {
	case MethodA256GCMKW:
		if err := ValidateKEKID(a.KEKID); err != nil {
			return fmt.Errorf("annotation: %w", err)
		}
		if a.KEKVersion < 0 {
			return fmt.Errorf("annotation: KEK version %d is negative", a.KEKVersion)
		}
	case MethodCopilot:
		return a.validateCopilot()
	case MethodAESGCM:
		if a.KEKID != "" || a.KEKVersion != 0 {
			return fmt.Errorf("annotation: method %s does not name a KEK", MethodAESGCM)
		}
		ivSize = OriginalIVSize
	case "":
		return errors.New("annotation has no method")
	default:
		return fmt.Errorf("annotation: method %.40q is not known to this version of pilot", a.Method)
	}
	if len(a.IV) != ivSize {
		return fmt.Errorf("annotation: IV of %d bytes, not %d", len(a.IV), ivSize)
	}
	if len(a.WrappedKey) <= TagSize {
		return fmt.Errorf("annotation: wrapped key of %d bytes is too short", len(a.WrappedKey))
	}
	return nil
}

func (a *Annotation) validateCopilot() error {
	switch n := len(a.WrappedKey); {
	case a.KEKVersion < 1:
		return fmt.Errorf("annotation: KEK version %d is not from 1", a.KEKVersion)
	case a.IV != nil:
		return fmt.Errorf("annotation: method %s has no IV", MethodCopilot)
	case n == 0 || n > MaxWrappedKey:
		return fmt.Errorf("annotation: wrapped key of %d bytes, not 1 to %d", n, MaxWrappedKey)
	}
	if err := ValidateKEKID(a.KEKID); err != nil {
		return fmt.Errorf("annotation: %w", err)
	}
	return nil
}

// AdditionalData returns what binds the wrapped key to its method, KEK and version:
// see [AdditionalData]. The original has none.
func (a *Annotation) AdditionalData() []byte {
	if a.Method == MethodAESGCM {
		return nil
	}
	return AdditionalData(a.Method, a.KEKID, a.KEKVersion)
}

// AdditionalData returns the additional data of AES-GCM for a wrapped layer key: the
// canonical JSON (RFC 8785) of its method, KEK and version.
func AdditionalData(method, kekID string, kekVersion int) []byte {
	if isVerbatim(kekID) && isVerbatim(method) { // as almost always
		return []byte(`{"kekId":"` + kekID + `","kekVersion":` + strconv.Itoa(kekVersion) + `,"method":"` + method + `"}`)
	}
	b, err := json.Marshal(struct {
		KEKID      string `json:"kekId"`
		KEKVersion int    `json:"kekVersion"`
		Method     string `json:"method"`
	}{kekID, kekVersion, method})
	if err != nil {
		panic(err) // strings and an int
	}
	return b
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

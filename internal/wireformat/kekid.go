package wireformat

import (
	"errors"
	"fmt"
	"strings"
)

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

// IsAgeRecipient reports whether what is named as a KEK is a recipient of age, or looks
// like one that was typed wrong. No KEK is called so.
func IsAgeRecipient(id string) bool {
	return len(id) >= len(agePrefix) && strings.EqualFold(id[:len(agePrefix)], agePrefix)
}

const agePrefix = "age1"

// IsSecretKey reports whether what is named as a KEK is a private key of age, which must
// go into no message.
func IsSecretKey(id string) bool {
	id = strings.ToUpper(id)
	return strings.HasPrefix(id, "AGE-SECRET-KEY-") || strings.HasPrefix(id, "AGE-PLUGIN-")
}

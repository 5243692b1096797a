// Package jwks prepares JSON Web Key Sets (RFC 7517) for go-jose.
package jwks

import (
	"encoding/json"
	"strings"
)

// certificates are the members of a key that say nothing but which certificates it has.
var certificates = []string{"x5c", "x5t", "x5t#S256", "x5u"}

// WithoutCertificates returns a key set without the certificates of its keys, which pilot
// does not look at. go-jose computes the SHA-1 of each, and so panics where Go does not
// allow that (GODEBUG=fips140=only). What is no key set stays as it is.
func WithoutCertificates(set []byte) []byte {
	var members map[string]json.RawMessage
	if json.Unmarshal(set, &members) != nil {
		return set
	}
	for name, value := range members {
		var keys []json.RawMessage
		// encoding/json, which go-oidc reads key sets with, takes names in any case.
		if !strings.EqualFold(name, "keys") || json.Unmarshal(value, &keys) != nil {
			continue
		}
		for i, text := range keys {
			var key map[string]json.RawMessage
			if json.Unmarshal(text, &key) != nil {
				continue // it is no object, and has no certificates
			}
			for _, name := range certificates {
				delete(key, name)
			}
			without, err := json.Marshal(key)
			if err != nil {
				return set
			}
			keys[i] = without
		}
		without, err := json.Marshal(keys)
		if err != nil {
			return set
		}
		members[name] = without
	}
	out, err := json.Marshal(members)
	if err != nil {
		return set
	}
	return out
}

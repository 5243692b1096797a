package processor

import (
	"bytes"

	"github.com/containers/ocicrypt/config"
)

// combined returns the keys of all of dcs. No slice of it is one of theirs, so
// that what is appended to one is in no other; the keys themselves are.
func combined(dcs ...*config.DecryptConfig) *config.DecryptConfig {
	all := &config.DecryptConfig{Parameters: map[string][][]byte{}}
	for _, dc := range dcs {
		for name, values := range dc.Parameters {
			all.Parameters[name] = append(all.Parameters[name], values...)
		}
	}
	return all
}

// clonedKeys returns a copy of dc that shares nothing with it.
func clonedKeys(dc *config.DecryptConfig) *config.DecryptConfig {
	own := combined(dc)
	for _, values := range own.Parameters {
		for i, v := range values {
			values[i] = bytes.Clone(v)
		}
	}
	return own
}

// clearKeys overwrites the keys of dc.
func clearKeys(dc *config.DecryptConfig) {
	for _, values := range dc.Parameters {
		for _, v := range values {
			clear(v)
		}
	}
}

// Package version holds the version of pilot's programs.
package version

import "github.com/ctrlplane/pilot/internal/fips"

// Version is set by the linker from the repository's tag.
var Version = "dev"

// Text returns the version as programs print it: with the FIPS 140-3 module and mode, if
// the program has one.
func Text() string {
	if d := fips.Describe(); d != "" {
		return Version + " (" + d + ")"
	}
	return Version
}

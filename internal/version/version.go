// Package version holds the version of pilot's programs.
package version

// Version is set by the linker from the repository's tag.
var Version = "dev"

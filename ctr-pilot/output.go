package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unicode"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/image"
)

// shown returns untrusted text, such as an image's, escaped for a table on a terminal.
func shown(s string) string {
	q := strconv.Quote(s)
	return q[1 : len(q)-1]
}

// shownText returns untrusted text without control characters, except line breaks and
// tabs.
func shownText(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) && r != '\n' && r != '\t' {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}

// printPlain prints a line for each blob.
func printPlain(what string, list []image.Plain) {
	for _, p := range list {
		fmt.Fprintf(os.Stderr, "ctr-pilot: %s: %s\n", what, p)
	}
}

func printJSON(v any) error {
	e := json.NewEncoder(os.Stdout)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// warnSkipped warns of manifests that stay as they are, and why.
func warnSkipped(skipped []ocispec.Descriptor, why string) {
	for _, s := range skipped {
		fmt.Fprintf(os.Stderr, "ctr-pilot: warning: manifest %s %s stays as it is: %s\n", shown(s.Digest.String()), ofPlatform(s), why)
	}
}

// ofPlatform returns the platform of an entry of an index, for a sentence.
func ofPlatform(entry ocispec.Descriptor) string {
	if entry.Platform == nil {
		return "of no platform"
	}
	return shown("of " + platforms.FormatAll(*entry.Platform))
}

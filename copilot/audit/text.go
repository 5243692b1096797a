package audit

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Sizes of what a caller can write into one field, in bytes. What is longer is
// shown by its beginning and its digest.
const (
	maxName   = 512 // identities and KEKs
	maxReason = 512
	maxShort  = 128 // addresses, ids
	maxClaim  = 200 // claims of a token
)

// printable returns s as a line of the log has it: two that differ never look the same.
// What is printable and short stays as it is, unless it begins with a quotation mark.
// Anything else is quoted as a string of Go's, with escapes for control characters,
// those that change how others are shown, spaces of other kinds, and bytes that are
// no UTF-8. What is longer than most bytes is cut, and its SHA-256 follows the quotes.
func printable(s string, most int) string {
	plain := utf8.ValidString(s) && !strings.HasPrefix(s, `"`) && !strings.ContainsFunc(s, func(r rune) bool { return !strconv.IsPrint(r) })
	if plain && len(s) <= most {
		return s
	}
	if q := strconv.Quote(s); len(q) <= most {
		return q
	}
	// An escape has up to ten bytes.
	begin := strconv.Quote(strings.ToValidUTF8(s[:min(len(s), most/2)], ""))
	if len(begin) > most {
		begin = strconv.Quote(strings.ToValidUTF8(s[:min(len(s), most/10)], ""))
	}
	return fmt.Sprintf("%s… (%d bytes, sha256:%x)", begin, len(s), sha256.Sum256([]byte(s)))
}

// Shown returns the entry with its fields as its line will have them.
func (e Entry) Shown() Entry {
	e.bound()
	return e
}

// bound bounds the fields that a caller can have something in.
func (e *Entry) bound() {
	if e.shown {
		return
	}
	e.shown = true
	for s, most := range map[*string]int{
		&e.Request: maxShort, &e.Trace: maxShort, &e.Action: maxShort, &e.KEK: maxName, &e.Subject: maxName,
		&e.Who: maxName, &e.Workload: maxName, &e.From: maxShort, &e.Reason: maxReason,
	} {
		*s = printable(*s, most)
	}
	e.Claims = bounded(e.Claims)
	e.Labels = bounded(e.Labels)
}

// bounded returns a copy of texts by name, each as a line has it.
func bounded(texts map[string]string) map[string]string {
	texts = maps.Clone(texts)
	for name, text := range texts {
		texts[name] = printable(text, maxClaim)
	}
	return texts
}

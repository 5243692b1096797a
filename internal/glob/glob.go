// Package glob matches names against patterns.
package glob

import (
	"strings"
	"unicode/utf8"
)

// MatchPath reports whether a name, which may have parts between slashes, matches a
// pattern: * is any run of characters except slashes, ** is any run, and everything
// else is itself.
func MatchPath(pattern, name string) bool { return match(pattern, name, true) }

// MatchName reports whether a name matches a pattern: * is any run of characters,
// slashes too, ? is any one character, and everything else is itself.
func MatchName(pattern, name string) bool { return match(pattern, name, false) }

func match(pattern, name string, path bool) bool {
	// Where to go on if what follows the last star does not fit: with one more
	// character of name under the star. A * gives way to the ** before it.
	type position struct{ pattern, name int }
	var single, double *position
	p, n := 0, 0
	next := func(n int) int {
		_, size := utf8.DecodeRuneInString(name[n:])
		return n + size
	}
	for {
		if strings.HasPrefix(pattern[p:], "**") {
			p += 2
			single, double = nil, &position{p, n}
			continue
		}
		if strings.HasPrefix(pattern[p:], "*") {
			p++
			if path {
				single = &position{p, n}
			} else {
				double = &position{p, n}
			}
			continue
		}
		switch {
		case p < len(pattern) && n < len(name) && pattern[p] == name[n]:
			p, n = p+1, n+1
		case !path && p < len(pattern) && n < len(name) && pattern[p] == '?':
			p, n = p+1, next(n)
		case p == len(pattern) && n == len(name):
			return true
		case single != nil && single.name < len(name) && name[single.name] != '/':
			single.name = next(single.name)
			p, n = single.pattern, single.name
		case double != nil && double.name < len(name):
			double.name = next(double.name)
			p, n, single = double.pattern, double.name, nil
		default:
			return false
		}
	}
}

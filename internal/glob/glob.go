// Package glob matches names against patterns.
package glob

import (
	"strings"
	"unicode/utf8"
)

// MatchPath reports whether a name, which may have parts between slashes, matches a
// pattern: * is any run of characters except slashes, ** is any run, and everything
// else is itself.
func MatchPath(pattern, name string) bool {
	matched, _ := match(pattern, name, true)
	return matched
}

// MatchName reports whether a name matches a pattern: * is any run of characters,
// slashes too, ? is any one character, and everything else is itself.
func MatchName(pattern, name string) bool {
	matched, _ := match(pattern, name, false)
	return matched
}

// match also returns how many steps it took: about len(pattern) * len(name) at most.
func match(pattern, name string, path bool) (matched bool, steps int) {
	// Where to go on if what follows the last star does not fit: with one more
	// character of name under the star. A * gives way to the ** before it.
	type position struct{ pattern, name int }
	var single, double *position
	// What follows a ** up to the first * after it has matched name[double.name:end].
	end := 0
	p, n := 0, 0
	next := func(n int) int {
		_, size := utf8.DecodeRuneInString(name[n:])
		return n + size
	}
	for {
		steps++
		if strings.HasPrefix(pattern[p:], "**") {
			p += 2
			single, double = nil, &position{p, n}
			continue
		}
		if strings.HasPrefix(pattern[p:], "*") {
			p++
			if path {
				if single == nil {
					end = n
				}
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
			return true, steps
		case single != nil && single.name < len(name) && name[single.name] != '/':
			single.name = next(single.name)
			p, n = single.pattern, single.name
		case double != nil && double.name < len(name):
			start := next(double.name)
			if single != nil {
				// All that can follow a match that ends before the next slash was tried
				// after this one.
				slash := strings.IndexByte(name[end:], '/')
				if slash < 0 {
					return false, steps
				}
				start = max(start, double.name+slash+1)
			}
			double.name = start
			p, n, single = double.pattern, double.name, nil
		default:
			return false, steps
		}
	}
}

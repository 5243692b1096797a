package policy

import "strings"

// match reports whether name matches pattern. In a pattern, * stands for
// any run of characters but slashes, ** for any run, and everything else for
// itself.
func match(pattern, name string) bool {
	// Where to go on if what follows the last star does not fit: with one more
	// character of name under the star. A * gives way to the ** before it.
	type place struct{ pattern, name int }
	var single, double *place
	p, n := 0, 0
	for {
		if strings.HasPrefix(pattern[p:], "**") {
			p += 2
			single, double = nil, &place{p, n}
			continue
		}
		if strings.HasPrefix(pattern[p:], "*") {
			p++
			single = &place{p, n}
			continue
		}
		switch {
		case p < len(pattern) && n < len(name) && pattern[p] == name[n]:
			p, n = p+1, n+1
		case p == len(pattern) && n == len(name):
			return true
		case single != nil && single.name < len(name) && name[single.name] != '/':
			single.name++
			p, n = single.pattern, single.name
		case double != nil && double.name < len(name):
			double.name++
			p, n, single = double.pattern, double.name, nil
		default:
			return false
		}
	}
}

package glob

import (
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestMatchPath(t *testing.T) {
	for _, test := range []struct {
		pattern, name string
		want          bool
	}{
		{"", "", true}, {"", "a", false}, {"a", "a", true}, {"a", "b", false}, {"a", "ab", false},
		{"*", "", true}, {"*", "abc", true}, {"*", "a/b", false}, {"**", "a/b", true},
		{"a*", "abc", true}, {"a*c", "abc", true}, {"a*c", "abcd", false}, {"a*b*c", "axbybc", true},
		{"spiffe://example.com/node/*", "spiffe://example.com/node/7", true},
		{"spiffe://example.com/node/*", "spiffe://example.com/node/7/x", false},
		{"spiffe://example.com/node/*", "spiffe://example.com.evil.org/node/7", false},
		{"spiffe://example.com/**", "spiffe://example.com/a/b", true},
		{"**/prod/*", "a/prod/x", true}, {"**/prod/*", "a/prod/x/prod/y", true}, {"**/prod/*", "a/prod/x/y", false},
		{"*/b/**", "a/b/c/d", true}, {"*/b/**", "a/c/b/d", false},
		{"team-?", "team-a", false}, {"team-[ab]", "team-a", false}, {"a.c", "abc", false},
	} {
		if got := MatchPath(test.pattern, test.name); got != test.want {
			t.Errorf("%q matches %q: %t", test.pattern, test.name, got)
		}
	}
}

func TestMatchName(t *testing.T) {
	for _, test := range []struct {
		pattern, name string
		want          bool
	}{
		{"registry.example.com/*", "registry.example.com/team/app:1", true},
		{"registry.example.com/app:*", "registry.example.com/app:1", true},
		{"registry.example.com/app:*", "registryXexample.com/app:1", false},
		{"*/app:?", "registry.example.com/app:1", true},
		{"*/app:?", "registry.example.com/app:10", false},
		{"[::1]:5000/app:*", "[::1]:5000/app:1", true},
		{"app", "app:1", false},
		{"a?c", "aéc", true}, {"a??c", "aéc", false}, {"x*??y", "x€y", false}, {"?", "", false}, {"a?", "a?", true},
	} {
		if got := MatchName(test.pattern, test.name); got != test.want {
			t.Errorf("%q matches %q: %t", test.pattern, test.name, got)
		}
	}
}

// maxSteps bounds the steps of matching.
func maxSteps(pattern, name string) int { return 2 * (len(pattern) + 1) * (len(name) + 1) }

// TestStepsAreBoundedByThePatternTimesTheName has names that nearly match in many ways.
func TestStepsAreBoundedByThePatternTimesTheName(t *testing.T) {
	for _, units := range [][2]string{
		{"**a*b", "a"}, {"**a*b", "a/"}, {"**a*b", "ab"}, {"**a*/b", "a/"}, {"*a", "a"}, {"**a", "a"}, {"**a*a*a*a*b", "aaaaa/"}, {"**/*/*/*b", "a/"}, {"**/*a/*a", "/aaa"},
	} {
		for _, n := range []int{1, 10, 100} {
			pattern, name := strings.Repeat(units[0], n)+"c", strings.Repeat(units[1], 40*n)
			for _, path := range []bool{true, false} {
				if matched, steps := match(pattern, name, path); matched || steps > maxSteps(pattern, name) {
					t.Errorf("%d times %q, %d times %q, as paths: %t: matches: %t, %d steps, at most %d", n, units[0], 40*n, units[1], path, matched, steps, maxSteps(pattern, name))
				}
			}
		}
	}
}

// FuzzMatch compares with regular expressions.
func FuzzMatch(f *testing.F) {
	f.Add("a*b**c", "axb/yc")
	f.Add("**/x*/**y", "a/b/xx/yy/y")
	f.Add("****", "a\n/b")
	f.Add("x*??y*", "x€y")
	f.Add("**a*b/c*d**e", "axb/ab/cd/ab/c/de")
	f.Fuzz(func(t *testing.T, pattern, name string) {
		if len(pattern) > 50 || len(name) > 50 || !utf8.ValidString(pattern) || !utf8.ValidString(name) {
			return
		}
		quoted := regexp.QuoteMeta(pattern)
		path := strings.NewReplacer(`\*\*`, `(?s:.*)`, `\*`, `[^/]*`).Replace(quoted)
		names := strings.NewReplacer(`\*`, `(?s:.*)`, `\?`, `(?s:.)`).Replace(quoted)
		if got := MatchPath(pattern, name); got != regexp.MustCompile(`\A(?:`+path+`)\z`).MatchString(name) {
			t.Errorf("path %q matches %q: %t", pattern, name, got)
		}
		if got := MatchName(pattern, name); got != regexp.MustCompile(`\A(?:`+names+`)\z`).MatchString(name) {
			t.Errorf("name %q matches %q: %t", pattern, name, got)
		}
		for _, path := range []bool{true, false} {
			if _, steps := match(pattern, name, path); steps > maxSteps(pattern, name) {
				t.Errorf("%q and %q, as paths: %t: %d steps, at most %d", pattern, name, path, steps, maxSteps(pattern, name))
			}
		}
	})
}

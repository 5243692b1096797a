package audit

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"
)

// TestText checks that names which look the same are written differently.
func TestText(t *testing.T) {
	long := strings.Repeat("x", 600)
	for s, want := range map[string]string{
		"":                              "",
		"spiffe://example.com/node/7":   "spiffe://example.com/node/7",
		"cn:Jürgen Müller":              "cn:Jürgen Müller",
		`cn:DOMAIN\user`:                `cn:DOMAIN\user`,
		"cn:a\x01":                      `"cn:a\x01"`,
		`cn:a\x01`:                      `cn:a\x01`,
		`"cn:a\x01"`:                    `"\"cn:a\\x01\""`,
		"cn:a\n":                        `"cn:a\n"`,
		"cn:a\u202eb":                   `"cn:a\u202eb"`,
		"cn:a\u200bb":                   `"cn:a\u200bb"`,
		"cn:a\u00a0b":                   `"cn:a\u00a0b"`,
		"cn:a\ufffd":                    "cn:a\ufffd",
		"cn:a\xff":                      `"cn:a\xff"`,
		"cn:a\xfe":                      `"cn:a\xfe"`,
		"spiffe://example.com/node%2f7": "spiffe://example.com/node%2f7",
	} {
		if got := printable(s, maxName); got != want {
			t.Errorf("%q: %s, want %s", s, got, want)
		}
	}
	a, b := printable(long+"a", maxName), printable(long+"b", maxName)
	if a == b || !strings.Contains(a, "(601 bytes, sha256:") || printable(a, maxName) == a {
		t.Errorf("%s and %s", a, b)
	}
}

// FuzzText looks for two texts that are shown alike: what is shown plainly is the
// text, and what is quoted can be unquoted, or has its digest.
func FuzzText(f *testing.F) {
	f.Add("a", "b")
	f.Add("a\x01", "a\x02")
	f.Add(strings.Repeat("\U000e0001", 300), strings.Repeat("\x7f", 700))
	f.Fuzz(func(t *testing.T, a, b string) {
		shownA, shownB := printable(a, maxReason), printable(b, maxReason)
		if a != b && shownA == shownB {
			t.Errorf("%q and %q are both shown as %s", a, b, shownA)
		}
		if len(shownA) > maxReason+120 || !utf8.ValidString(shownA) {
			t.Errorf("%q is shown in %d bytes: %s", a, len(shownA), shownA)
		}
		e := Entry{KEK: a, Who: b, From: a, Reason: b, Subject: a, Request: b, Trace: a}
		e.bound()
		line, _, err := testKey(t).seal(line{Chain: "6f1c0a9b2d3e", Seq: 1, Entry: e})
		if err != nil || len(line) > 6000 || strings.ContainsAny(string(line), "\n\r") || !json.Valid(line) {
			t.Errorf("a line of %d bytes: %v", len(line), err)
		}
	})
}

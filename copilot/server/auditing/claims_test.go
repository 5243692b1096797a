package auditing

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/policy"
)

// TestClaimsInALineAreBounded has an issuer whose claims are as long as a token may have
// them, and of what takes most room in a line.
func TestClaimsInALineAreBounded(t *testing.T) {
	for _, unit := range []string{"x", "\"", "\\", "\x00", "\u202e", "\xff", "é", "<"} {
		for _, n := range []int{1, 10, 50, 100, 199, 1000, 16000} {
			claims := make(policy.Claims)
			var others []string
			for _, name := range shownClaims {
				claims[name] = []string{strings.Repeat(unit, n)}
			}
			for i := range min(200, 1<<20/n) { // more is in no token
				others = append(others, fmt.Sprintf("claim%d", i))
				claims[others[i]] = []string{strings.Repeat(unit, n), "x"}
			}
			claims["run_id"] = []string{"9876543210"}
			shown := audit.Entry{Claims: Claims(claims, others)}.Shown().Claims
			var line bytes.Buffer
			e := json.NewEncoder(&line)
			e.SetEscapeHTML(false) // as the log is written
			if err := e.Encode(shown); err != nil {
				t.Fatal(err)
			}
			if line.Len() > 6000 || shown["run_id"] != "9876543210" {
				t.Errorf("%q times %d: %d bytes, run %q", unit, n, line.Len(), shown["run_id"])
			}
		}
	}
	// A long one keeps no short one out.
	full := policy.Claims{"owner_id": {"4711"}}
	for i := range 8 {
		full[fmt.Sprintf("long%d", i)] = []string{strings.Repeat("x", 300)}
	}
	if c := Claims(full, append(slices.Sorted(maps.Keys(full)), "owner_id")); c["owner_id"] != "4711" || len(c) != 7 {
		t.Errorf("%v", c)
	}
	if c := Claims(policy.Claims{"groups": {"a", "b"}, "email": {"x"}}, []string{"groups"}); len(c) != 1 || c["groups"] != `["a","b"]` {
		t.Errorf("%v", c)
	}
}

func TestClaimsThatDifferNeverLookTheSame(t *testing.T) {
	seen := make(map[string][]string)
	for _, texts := range [][]string{
		{"a b"}, {"a", "b"}, {"b", "a"}, {`["a","b"]`}, {`["a"`, `"b"]`}, {`a","b`}, {"[]"}, {""}, {"", ""}, {"a", "b", ""}, {`["a","b"]`, "c"}, {"\xff", "x"}, {"\ufffd", "x"},
	} {
		shown := audit.Entry{Claims: Claims(policy.Claims{"groups": texts}, []string{"groups"})}.Shown().Claims["groups"]
		if other, ok := seen[shown]; ok {
			t.Errorf("%q and %q are both %s", texts, other, shown)
		}
		seen[shown] = texts
	}
}

package policy

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

const example = `
[[rule]]
identities = ["spiffe://example.com/node/*", "k8s:system:serviceaccount:*:puller"]
keks = ["team-a", "shared/**"]
actions = ["unwrap", "export"]

[[rule]]
identities = ["dns:ci.example.com"]
keks = ["**"]
actions = ["wrap"]
not-before = 2026-01-01T00:00:00Z
not-after = 2027-01-01T00:00:00Z

[[rule]]
identities = ["spiffe://example.com/node/stolen"]
keks = ["**"]
actions = ["wrap", "unwrap", "export", "admin"]
deny = true

[[limit]]
identities = ["dns:ci.*"]
per-second = 5
burst = 7
`

func TestDecide(t *testing.T) {
	p, err := parse("policy.toml", []byte(example), nil)
	if err != nil {
		t.Fatal(err)
	}
	in2026, in2027 := time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC), time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, test := range []struct {
		identity, kek string
		action        Action
		now           time.Time
		allowed       bool
		reason        string
	}{
		{"spiffe://example.com/node/7", "team-a", Unwrap, in2026, true, "rule 1 of policy.toml allows it"},
		{"spiffe://example.com/node/7", "shared/x/y", Export, in2026, true, "rule 1"},
		{"k8s:system:serviceaccount:prod:puller", "team-a", Unwrap, in2026, true, "rule 1"},
		{"spiffe://example.com/node/7", "team-a", Wrap, in2026, false, "no rule of policy.toml allows wrap: those for spiffe://example.com/node/7 with team-a allow export, unwrap"},
		{"spiffe://example.com/node/7", "team-b", Unwrap, in2026, false, "no rule of policy.toml for spiffe://example.com/node/7 names the KEK team-b"},
		{"spiffe://example.com/node/stolen", "team-a", Unwrap, in2026, false, "rule 3 of policy.toml denies it"},
		{"dns:ci.example.com", "any", Wrap, in2026, true, "rule 2"},
		{"dns:ci.example.com", "any", Wrap, in2027, false, "rule 2 of policy.toml allowed it, until 2027-01-01T00:00:00Z"},
		{"dns:ci.example.com", "any", Wrap, in2026.AddDate(-1, 0, 0), false, "rule 2 of policy.toml would allow it, from 2026-01-01T00:00:00Z on"},
		{"cn:anybody", "team-a", Unwrap, in2026, false, "no rule of policy.toml names cn:anybody"},
		{"", "", Admin, in2026, false, "no rule"},
	} {
		v := p.Decide(Principal{Identity: test.identity}, test.kek, test.action, test.now)
		if v.Allowed != test.allowed || !strings.Contains(v.Reason, test.reason) {
			t.Errorf("%s %s %s: %+v", test.identity, test.action, test.kek, v)
		}
	}
	node := Principal{Identity: "spiffe://example.com/node/7"}
	if !p.Usable(node, in2026)("team-a") || p.Usable(node, in2026)("team-b") {
		t.Error("May is wrong")
	}
	if r, b := p.Limit("dns:ci.example"); r != 5 || b != 7 {
		t.Errorf("limit %v %v", r, b)
	}
	if r, b := p.Limit("dns:other"); r != defaultPerSecond || b != defaultBurst {
		t.Errorf("limit %v %v", r, b)
	}
	if _, err := parse("empty", nil, nil); err == nil || !strings.Contains(err.Error(), "empty has no rules") {
		t.Errorf("an empty policy: %v", err)
	}
}

func TestParseErrors(t *testing.T) {
	full := func(line string) string {
		return "[[rule]]\nidentities = [\"uid:1\"]\nkeks = [\"b\"]\nactions = [\"wrap\"]\n" + line
	}
	for text, want := range map[string]string{
		"[[rule]]\n":              "policy: f: rule 1: it needs identities, keks and actions",
		"[[rule]\n":               "policy: f:1:",
		full("allow = true\n"):    "policy: f:5: rule.allow: unknown setting",
		full("[[rules]]\n"):       "unknown setting",
		full("not-after = \"x\""): "policy: f:5",
		full("not-before = 2027-01-01T00:00:00Z\nnot-after = 2026-01-01T00:00:00Z"): "not-after is not after not-before",
		strings.Replace(full(""), "wrap", "warp", 1):                                `"warp" is no action`,
		strings.Replace(full(""), `"b"`, `"b", ""`, 1):                              "empty name",
		strings.Replace(full(""), `"uid:1"`, `"uid:***"`, 1):                        "use * for",
		"[[limit]]\nidentities = [\"uid:1\"]\n":                                     "limit 1: per-second has to be above 0",
		"[[limit]]\nidentities = [\"uid:1\"]\nper-second = nan\nburst = 1":          "per-second has to be above 0",
		"[[limit]]\nper-second = 1\nburst = 1":                                      "it needs identities",
	} {
		if _, err := parse("f", []byte(text), nil); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(example))
	f.Add([]byte(workloads))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := parse("f", b, nil)
		if err != nil {
			return
		}
		now := time.Now()
		a := Principal{Identity: "dns:a"}
		may := slices.ContainsFunc(Actions, func(action Action) bool { return p.Decide(a, "team-a", action, now).Allowed })
		vouched := a
		vouched.Workload = "prod/web"
		may = may || p.Decide(vouched, "team-a", Unwrap, now).Allowed
		forWorkloads := slices.ContainsFunc(p.rules, func(r rule) bool { return r.Workloads != nil })
		if usable := p.Usable(a, now)("team-a"); usable != may && !(usable && forWorkloads) {
			t.Errorf("a list has the KEK: %t", !may)
		}
		p.Limit("dns:a")
	})
}

func TestFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "policy.toml")
	if _, err := Open(name, nil); err == nil {
		t.Error("opened what is not there")
	}
	put := func(text string) {
		t.Helper()
		if err := os.WriteFile(name+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(name+".new", name); err != nil {
			t.Fatal(err)
		}
	}
	may := func(f *File) bool {
		return f.Policy().Decide(Principal{Identity: "dns:ci.example.com"}, "x", Wrap, time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)).Allowed
	}
	reload := func(f *File, wantChanged, wantErr bool) {
		t.Helper()
		if changed, err := f.Reload(false); changed != wantChanged || (err != nil) != wantErr {
			t.Errorf("changed %t, %v", changed, err)
		}
	}
	put(example)
	f, err := Open(name, nil)
	if err != nil || !may(f) {
		t.Fatal(err)
	}
	reload(f, false, false)
	put("broken")
	reload(f, false, true)
	reload(f, false, false) // reported once
	if !may(f) {
		t.Error("a broken file took the policy away")
	}
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	reload(f, false, true)
	reload(f, false, false)
	if !may(f) {
		t.Error("a missing file took the policy away")
	}
	put("# what follows is not written yet")
	reload(f, false, true)
	if !may(f) {
		t.Error("an empty file took the policy away")
	}
	put("[[rule]]\nidentities=[\"**\"]\nkeks=[\"**\"]\nactions=[\"wrap\"]\ndeny=true\n")
	reload(f, true, false)
	if may(f) {
		t.Error("the new policy does not count")
	}
}

// TestAdmins asks who may admin KEKs that need not be there.
func TestAdmins(t *testing.T) {
	p, err := parse("p", []byte(`
[[rule]]
identities = ["dns:admin", "dns:both", "dns:not-all"]
keks = ["made-later-*"]
actions = ["admin", "unwrap"]
[[rule]]
identities = ["dns:node"]
keks = ["**"]
actions = ["unwrap"]
[[rule]]
identities = ["dns:was"]
keks = ["**"]
actions = ["admin"]
not-after = 2025-01-01T00:00:00Z
[[rule]]
identities = ["dns:both"]
keks = ["**"]
actions = ["admin"]
deny = true
[[rule]]
identities = ["dns:not-all"]
keks = ["made-later-1"]
actions = ["admin"]
deny = true
`), nil)
	if err != nil {
		t.Fatal(err)
	}
	for identity, admins := range map[string]bool{"dns:admin": true, "dns:both": false, "dns:not-all": true, "dns:node": false, "dns:was": false} {
		if p.Admins(Principal{Identity: identity}, time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)) != admins {
			t.Errorf("%s: not %t", identity, admins)
		}
	}
}

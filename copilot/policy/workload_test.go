package policy

import (
	"slices"
	"strings"
	"testing"
	"time"
)

const workloads = `
[[rule]]
identities = ["dns:*"]
keks = ["team-a", "shared"]
actions = ["unwrap"]

[[rule]]
identities = ["dns:*"]
keks = ["team-a"]
actions = ["unwrap"]
workloads = ["prod/*", "ci/builder-*"]

[[rule]]
identities = ["dns:gpu"]
keks = ["team-a"]
actions = ["unwrap"]
workloads = ["ml/**"]
not-after = 2027-01-01T00:00:00Z

[[rule]]
identities = ["dns:*"]
keks = ["team-a"]
actions = ["unwrap"]
workloads = ["prod/debug"]
deny = true

[[rule]]
identities = ["dns:stolen"]
keks = ["**"]
actions = ["unwrap"]
deny = true

[[rule]]
identities = ["dns:*"]
keks = ["runs-only"]
actions = ["unwrap"]
workloads = ["**"]
`

func TestWorkloadsAreAllowedByRulesThatNameThem(t *testing.T) {
	p, err := parse("p", []byte(workloads), nil)
	if err != nil {
		t.Fatal(err)
	}
	in2026, in2027 := time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC), time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, test := range []struct {
		identity, workload, kek string
		now                     time.Time
		allowed                 bool
		reason                  string
	}{
		{"dns:a", "prod/web", "team-a", in2026, true, "rule 2 of p allows it"},
		{"dns:a", "ci/builder-7", "team-a", in2026, true, "rule 2"},
		{"dns:a", "prod/", "team-a", in2026, true, "rule 2"}, // of an account that the node does not know
		{"dns:a", "ci/", "team-a", in2026, false, "is for other workloads"},
		{"dns:a", "ci/other", "team-a", in2026, false, `rule 2 of p is for other workloads: ci/other is not "prod/*" or "ci/builder-*"`},
		{"dns:a", "production/web", "team-a", in2026, false, "is for other workloads"},
		{"dns:a", "xprod/web", "team-a", in2026, false, "is for other workloads"},
		{"dns:a", "prod/debug", "team-a", in2026, false, "rule 4 of p denies it"},
		{"dns:a", "", "team-a", in2026, true, "rule 1 of p allows it"},
		{"dns:a", "prod/web", "shared", in2026, false, "rule 1 of p is for the node itself, and no rule is for the workload prod/web"},
		{"dns:a", "", "shared", in2026, true, "rule 1"},
		{"dns:a", "", "runs-only", in2026, false, "rule 6 of p is for workloads, and the request names none"},
		{"dns:a", "any/one", "runs-only", in2026, true, "rule 6"},
		{"dns:a", "prod/web", "other", in2026, false, "no rule of p for dns:a names the KEK other"},
		{"dns:gpu", "ml/x", "team-a", in2026, true, "rule 3"},
		{"dns:gpu", "ml/x", "team-a", in2027, false, "rule 3 of p allowed it, until 2027-01-01"},
		{"dns:stolen", "prod/web", "team-a", in2026, false, "rule 5 of p denies it"},
		{"dns:stolen", "", "team-a", in2026, false, "rule 5 of p denies it"},
		{"cn:a", "prod/web", "team-a", in2026, false, "no rule of p names cn:a"},
	} {
		who := Principal{Identity: test.identity, Workload: test.workload}
		v := p.Decide(who, test.kek, Unwrap, test.now)
		if v.Allowed != test.allowed || !strings.Contains(v.Reason, test.reason) {
			t.Errorf("%+v", test)
			t.Errorf("%+v", v)
		}
		for _, action := range []Action{Wrap, Export, Admin} {
			if v := p.Decide(who, test.kek, action, test.now); v.Allowed {
				t.Errorf("%+v: %s: %+v", test, action, v)
			}
		}
	}
	// What some workload may use is in a node's list.
	for kek, want := range map[string]bool{"team-a": true, "runs-only": true, "other": false} {
		if p.Usable(Principal{Identity: "dns:a"}, in2026)(kek) != want {
			t.Errorf("a list has %s: %t", kek, !want)
		}
	}
	if p.Usable(Principal{Identity: "dns:stolen"}, in2026)("team-a") {
		t.Error("a list has a KEK that is denied to the node")
	}
	grants := p.Grants(Principal{Identity: "dns:a"}, in2026)
	if len(grants) != 4 || !slices.Equal(grants[1].Workloads, []string{"prod/*", "ci/builder-*"}) || grants[0].Workloads != nil {
		t.Errorf("%+v", grants)
	}
}

func TestWorkloadsThatCanNotMatchAreErrors(t *testing.T) {
	rule := func(actions, lines string) error {
		_, err := parse("p", []byte("[[rule]]\nidentities = ['cluster:**']\nkeks = ['team-a']\nactions = ["+actions+"]\n"+lines), nil)
		return err
	}
	for lines, want := range map[string]string{
		`workloads = []`:                                 "workloads is an empty array",
		`workloads = [""]`:                               "an empty name",
		`workloads = ["prod"]`:                           `"prod" matches none: they are NAMESPACE/SERVICEACCOUNT, as in "prod/*"`,
		`workloads = ["*"]`:                              "matches none",
		`workloads = ["prod/***"]`:                       "use * for",
		`workloads = "prod/*"`:                           "p:5",
		`workload = ["prod/*"]`:                          "unknown setting",
		"[rule.claims]\nx = 'y'\nworkloads = ['prod/*']": "claims: workloads is a setting of the rule: write it above [rule.claims]",
	} {
		if err := rule("'unwrap'", lines); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", lines, err)
		}
	}
	for _, actions := range []string{"'export'", "'unwrap', 'export'", "'wrap'", "'admin'"} {
		if err := rule(actions, "workloads = ['prod/*']"); err == nil || !strings.Contains(err.Error(), "a rule with workloads is for unwrap only") {
			t.Errorf("%s: %v", actions, err)
		}
	}
	for _, lines := range []string{"workloads = ['**']", "workloads = ['prod/*', '*/builder', '**-ci/x']"} {
		if err := rule("'unwrap'", lines); err != nil {
			t.Error(err)
		}
	}
	for name, ok := range map[string]bool{
		"prod/web": true, "prod/": true, "prod/web.v2": true, "p/w": true, strings.Repeat("n", 63) + "/" + strings.Repeat("s", 253): true,
		"": false, "prod": false, "/": false, "/web": false, "prod/web/x": false, "Prod/web": false, "prod/*": false, "prod/web\n": false, "a.b/web": false,
		"-/web": false, strings.Repeat("n", 64) + "/s": false, "n/" + strings.Repeat("s", 254): false, "prod/wéb": false,
	} {
		if err := CheckWorkload(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestBuiltInPolicyIsForAllWorkloads(t *testing.T) {
	for _, workload := range []string{"", "prod/web"} {
		if v := Local("uid:0").Decide(Principal{Identity: "uid:0", Workload: workload}, "team-a", Unwrap, time.Now()); !v.Allowed {
			t.Errorf("%q: %+v", workload, v)
		}
	}
}

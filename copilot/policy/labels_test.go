package policy

import (
	"slices"
	"strings"
	"testing"
	"time"
)

const labelled = `
[[rule]]
identities = ["dns:*"]
keks = ["team-a"]
actions = ["unwrap"]
workloads = ["prod/*"]
labels = "tier=gold,app in (web,api)"

[[rule]]
identities = ["dns:*"]
keks = ["team-b"]
actions = ["unwrap"]
workloads = ["prod/*"]
labels = "!debug"

[[rule]]
identities = ["dns:*"]
keks = ["team-c"]
actions = ["unwrap"]
workloads = ["prod/*"]

[[rule]]
identities = ["dns:*"]
keks = ["team-c"]
actions = ["unwrap"]
workloads = ["prod/*"]
labels = "example.com/quarantine"
deny = true
`

func TestLabelsNarrowWhatAWorkloadMayUse(t *testing.T) {
	p, err := parse("p", []byte(labelled), nil)
	if err != nil {
		t.Fatal(err)
	}
	type labels map[string]string
	for _, test := range []struct {
		workload, kek string
		labels        labels
		allowed       bool
		reason        string
	}{
		{"prod/web", "team-a", labels{"tier": "gold", "app": "web", "other": "x"}, true, "rule 1 of p allows it"},
		{"prod/web", "team-a", labels{"tier": "gold", "app": "api"}, true, "rule 1"},
		{"prod/web", "team-a", labels{"tier": "gold"}, false, "rule 1 of p is for other labels: the pod has no label app"},
		{"prod/web", "team-a", labels{"tier": "silver", "app": "db"}, false, `tier is "silver", not "gold"; app is "db", not "web" or "api"`},
		{"prod/web", "team-a", labels{}, false, "the pod has no label tier; the pod has no label app"},
		{"prod/web", "team-a", nil, false, "rule 1 of p is for workloads with labels, and the node does not report the pod's"},
		// They never reach another namespace, or what the node does itself.
		{"dev/web", "team-a", labels{"tier": "gold", "app": "web"}, false, `is for other workloads: dev/web is not "prod/*"`},
		{"", "team-a", labels{"tier": "gold", "app": "web"}, false, "the request names none"},
		{"prod/web", "team-b", labels{}, true, "rule 2"},
		{"prod/web", "team-b", labels{"debug": ""}, false, "the pod has the label debug"},
		{"prod/web", "team-b", nil, false, "does not report"},
		{"prod/web", "team-c", labels{"tier": "gold"}, true, "rule 3"},
		{"prod/web", "team-c", labels{"example.com/quarantine": "false"}, false, "rule 4 of p denies it"},
		{"prod/web", "team-c", nil, false, "rule 4 of p denies it"},
	} {
		v := p.Decide(Principal{Identity: "dns:a", Workload: test.workload, Labels: test.labels}, test.kek, Unwrap, time.Now())
		if v.Allowed != test.allowed || !strings.Contains(v.Reason, test.reason) {
			t.Errorf("%+v", test)
			t.Errorf("%+v", v)
		}
	}
	for _, test := range []struct{ identity, workload, kek, want string }{
		{"dns:a", "prod/web", "team-a", "app tier"},
		{"dns:a", "prod/web", "team-c", "example.com/quarantine"},
		{"dns:a", "dev/web", "team-a", ""},
		{"cn:a", "prod/web", "team-a", ""},
		{"dns:a", "prod/web", "team-x", ""},
	} {
		keys := p.LabelKeys(Principal{Identity: test.identity, Workload: test.workload}, test.kek, Unwrap)
		if keys == nil || strings.Join(keys, " ") != test.want {
			t.Errorf("%+v: %q", test, keys)
		}
	}
	if g := p.Grants(Principal{Identity: "dns:a"}, time.Now()); len(g) != 4 || g[0].Labels != "tier=gold,app in (web,api)" || g[2].Labels != "" {
		t.Errorf("%+v", g)
	}
}

// The semantics are Kubernetes' own: != and notin hold for a pod without the label.
func TestLabelSelectorsMeanWhatTheyDoInKubernetes(t *testing.T) {
	pods := []map[string]string{{}, {"tier": "gold"}, {"tier": "silver", "app": "web"}, {"tier": ""}, {"example.com/a_b.c": "v1.2"}}
	for text, want := range map[string][]int{
		"tier":                        {1, 2, 3},
		"!tier":                       {0, 4},
		"! tier , app":                nil,
		"tier=gold":                   {1},
		"tier == gold":                {1},
		"tier!=gold":                  {0, 2, 3, 4},
		"tier=":                       {3},
		"tier=,!app":                  {3},
		"tier in (gold)":              {1},
		"tier in(gold , silver)":      {1, 2},
		"tier notin (gold,silver)":    {0, 3, 4},
		"tier,app":                    {2},
		" tier = silver,app=web ":     {2},
		"example.com/a_b.c in (v1.2)": {4},
		"in notin (in),notin!=in":     {0, 1, 2, 3, 4},
	} {
		s, err := parseSelector(text)
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		var got []int
		for i, labels := range pods {
			if len(s.unmet(labels)) == 0 {
				got = append(got, i)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
	for text, want := range map[string]string{
		"":                             "it is empty",
		" ":                            "it is empty",
		",":                            "not a label's key",
		"a,":                           "not a label's key",
		"a=b,,c":                       "not a label's key",
		"=b":                           "not a label's key",
		"!":                            "not a label's key",
		"!a=b":                         "a comma is missing before",
		"a b":                          `"b" after a: the operators are`,
		"a=b c":                        "a comma is missing",
		"a>1":                          "not a label's key",
		"a > 1":                        `">" after a`,
		"a in b":                       "followed by values in parentheses",
		"a in":                         "followed by values in parentheses",
		"a in (":                       "the parenthesis is not closed",
		"a in (b":                      "the parenthesis is not closed",
		"a in (b c)":                   "the parenthesis is not closed",
		"a in ()":                      "the parenthesis is not closed",
		"a in (b,)":                    "the parenthesis is not closed",
		"a in (),b)":                   "not a label's value",
		"a=*":                          "not a label's value",
		"a=-b":                         "not a label's value",
		"a/b/c":                        "not a label's key",
		"/a":                           "not a label's key",
		"A.com/a":                      "not a label's key",
		"a=" + strings.Repeat("v", 64): "not a label's value",
		strings.Repeat("k", 64):        "not a label's key",
		strings.Repeat("a=b,", 2000):   "more than 4096 bytes",
	} {
		if _, err := parseSelector(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

func TestRulesWithLabelsAreChecked(t *testing.T) {
	rule := func(lines string) (*Policy, error) {
		return parse("p", []byte("[[rule]]\nidentities = ['cluster:**']\nkeks = ['team-a']\nactions = ['unwrap']\n"+lines), nil)
	}
	for lines, want := range map[string]string{
		"labels = 'tier=gold'":                                  "name the workloads too",
		"workloads = ['prod/*']\nlabels = ''":                   "labels: it is empty",
		"workloads = ['prod/*']\nlabels = 'tier>1'":             "labels: ",
		"workloads = ['prod/*']\nlabels = ['tier=gold']":        "p:6",
		"workloads = ['prod/*']\n[rule.claims]\nlabels = 'a=b'": "labels is a setting of a rule with workloads: write it above [rule.claims]",
	} {
		if _, err := rule(lines); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", lines, err)
		}
	}
	for workloads, warns := range map[string]bool{"prod/*": false, "ci-*/builder": false, "**": true, "*/web": true, "**/web": true} {
		p, err := rule("workloads = ['prod/web', '" + workloads + "']\nlabels = 'tier=gold'")
		if err != nil {
			t.Fatal(err)
		}
		if (len(p.Warnings) == 1) != warns || warns && !strings.Contains(p.Warnings[0], "is for every namespace") {
			t.Errorf("%s: %q", workloads, p.Warnings)
		}
	}
}

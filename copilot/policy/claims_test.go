package policy

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"
)

var forgeIssuers = Issuers{"github": "https://token.actions.githubusercontent.com", "gitlab": "https://gitlab.com", "cluster": "https://kubernetes.default.svc"}

// ruleFor returns a rule for wrap, with lines.
func ruleFor(identities, lines string) string {
	return "[[rule]]\nidentities = [" + identities + "]\nkeks = ['team-a']\nactions = ['wrap']\n" + lines + "\n"
}

func TestClaimsAreText(t *testing.T) {
	claims, err := ParseClaims([]byte(`{"s":"main","t":true,"f":false,"n":123456,"big":12345678901234567890,"half":1.50,"list":["a",1,true,null,{"x":1},["y"]],"none":null,"object":{"a":"b"},"empty":[]}`))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string][]string{
		"s": {"main"}, "t": {"true"}, "f": {"false"}, "n": {"123456"}, "big": {"12345678901234567890"}, "half": {"1.50"}, "list": {"a", "1", "true"},
	} {
		if !slices.Equal(claims[name], want) {
			t.Errorf("%s: %q, want %q", name, claims[name], want)
		}
	}
	if len(claims) != 7 {
		t.Errorf("%v", claims)
	}
	for _, bad := range []string{"", "null", "[]", `"x"`, `{"a":`} {
		if claims, err := ParseClaims([]byte(bad)); err == nil && len(claims) > 0 {
			t.Errorf("%s: %v", bad, claims)
		}
	}
}

func TestRuleWantsAllOfItsClaims(t *testing.T) {
	p, err := parse("p", []byte(ruleFor("'github:**'", `claims = { repository_id = 123456, ref = ["refs/heads/main", "refs/heads/release-*"], event_name = "push", ref_protected = true }`)+
		ruleFor("'github:**'", "claims = { repository_id = '123456', actor = 'mallory' }\ndeny = true")), forgeIssuers)
	if err != nil {
		t.Fatal(err)
	}
	main := func(change ...string) Claims {
		c := Claims{"repository_id": {"123456"}, "ref": {"refs/heads/main"}, "event_name": {"push"}, "ref_protected": {"true"}, "actor": {"alice"}}
		for i := 0; i < len(change); i += 2 {
			c[change[i]] = []string{change[i+1]}
		}
		return c
	}
	without := main()
	delete(without, "event_name")
	for name, test := range map[string]struct {
		claims Claims
		reason string // "" if it is allowed
	}{
		"main":              {main(), ""},
		"release branch":    {main("ref", "refs/heads/release-1"), ""},
		"several refs":      {func() Claims { c := main(); c["ref"] = []string{"refs/heads/x", "refs/heads/main"}; return c }(), ""},
		"below a release":   {main("ref", "refs/heads/release-1/x"), `ref is "refs/heads/release-1/x", not "refs/heads/main" or "refs/heads/release-*"`},
		"pull request":      {main("ref", "refs/pull/7/merge", "event_name", "pull_request"), `event_name is "pull_request", not "push"; ref is "refs/pull/7/merge"`},
		"another case":      {main("ref", "refs/heads/Main"), "refs/heads/Main"},
		"another's":         {main("repository_id", "1234567"), `repository_id is "1234567", not "123456"`},
		"unprotected":       {main("ref_protected", "false"), `ref_protected is "false", not "true"`},
		"without the claim": {without, "the token has no event_name"},
		"empty":             {main("event_name", ""), `event_name is "", not "push"`},
		"no claims":         {nil, "the token has no"},
		"denied":            {main("actor", "mallory"), "rule 2 of p denies it"},
	} {
		who := Principal{Identity: "github:repo:acme/app:ref:refs/heads/main", Claims: test.claims}
		v := p.Decide(who, "team-a", Wrap, anyTime)
		if v.Allowed != (test.reason == "") || !strings.Contains(v.Reason, test.reason) {
			t.Errorf("%s: %+v", name, v)
		}
		if p.Usable(who, anyTime)("team-a") != v.Allowed {
			t.Errorf("%s: a list has the KEK: %t", name, !v.Allowed)
		}
		if named := p.Names(who, anyTime); named != (v.Allowed || name == "denied") {
			t.Errorf("%s: named: %t", name, named)
		}
	}
	// A certificate has no claims.
	if v := p.Decide(Principal{Identity: "spiffe://example.com/ci"}, "team-a", Wrap, anyTime); v.Allowed {
		t.Errorf("%+v", v)
	}
	if names := p.ClaimNames(); !slices.Equal(names, []string{"actor", "event_name", "ref", "ref_protected", "repository_id"}) {
		t.Errorf("%q", names)
	}
}

func TestClaimsThatCanNotMatchAreErrors(t *testing.T) {
	for lines, want := range map[string]string{
		`claims = { ref = "" }`:                                           "claims: ref: an empty name",
		`claims = { ref = [] }`:                                           "claims: ref is an empty array",
		`claims = { ref = 1.5 }`:                                          "claims: ref has to be a string",
		`claims = { ref = 2026-01-01T00:00:00Z }`:                         "claims: ref has to be a string",
		`claims = { ref = { a = "b" } }`:                                  "claims: ref has to be a string",
		`claims = { ref = [["a"]] }`:                                      "claims: ref has to be a string",
		`claims = { ref = "a***" }`:                                       "use * for",
		`claims = "repository"`:                                           "p:5",
		`claim = { ref = "x" }`:                                           "unknown setting",
		"[rule.claims]\nref = 'refs/heads/main'\nx=nan":                   "claims: x has to be",
		`claims = {}`:                                                     "claims is empty",
		"[rule.claims]\n# ref = 'refs/heads/main'":                        "claims is empty",
		"[rule.claims]\nactor_id = 5\ndeny = true":                        "claims: deny is a setting of the rule: write it above [rule.claims]",
		"[rule.claims]\nactor_id = 5\nnot-after = '2026-01-01T00:00:00Z'": "claims: not-after is a setting",
	} {
		if _, err := parse("p", []byte(ruleFor("'cluster:**'", lines)), forgeIssuers); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", lines, err)
		}
	}
	for _, identity := range []string{"spiffe://example.com/**", "dns:*.example.com", "cn:x", "uid:0", "anonymous"} {
		if _, err := parse("p", []byte(ruleFor("'cluster:**', '"+identity+"'", `claims = { ref = "x" }`)), forgeIssuers); err == nil || !strings.Contains(err.Error(), "only tokens have claims") {
			t.Errorf("%s: %v", identity, err)
		}
	}
	if _, err := parse("p", []byte(ruleFor("'cluster:**'", `claims = { namespace = "x" }`)), forgeIssuers); err != nil {
		t.Error(err)
	}
}

// TestRuleThatLetsInEverybodyOfAForgeIsRefused tries rules by which the repositories of
// strangers get in.
func TestRuleThatLetsInEverybodyOfAForgeIsRefused(t *testing.T) {
	for _, test := range []struct{ identities, claims, want string }{
		{`'github:**'`, ``, "lets in everybody"},
		{`'**'`, ``, "lets in everybody"},
		{`'*'`, ``, "lets in everybody"},
		{`'g*'`, ``, "lets in everybody"},
		{`'github**'`, ``, "lets in everybody"},
		{`'spiffe://example.com/**', 'github:**'`, ``, "lets in everybody"},
		{`'github:*'`, `repository_id = "1"`, "use \"github:**\""},
		{`'github:**:ref:refs/heads/main'`, ``, "lets in everybody"},
		{`'github:repo:*/app:ref:refs/heads/main'`, ``, "lets in everybody"},
		{`'github:repo:acme*/app:**'`, ``, "lets in everybody"},
		{`'github:repo:**'`, ``, "lets in everybody"},
		{`'github:environment:production'`, ``, "lets in everybody"}, // by a subject of their own
		{`'github:job_workflow_ref:acme/ci/.github/workflows/x.yml@refs/heads/main'`, ``, "lets in everybody"},
		{`'github:**'`, `ref = "refs/heads/main", environment = "production"`, "lets in everybody"},
		{`'github:**'`, `job_workflow_ref = "acme/ci/.github/workflows/x.yml@refs/heads/main"`, "lets in everybody"},
		{`'github:**'`, `repository = "*"`, "lets in everybody"},
		{`'github:**'`, `repository = "**"`, "lets in everybody"},
		{`'github:**'`, `repository = "*/app"`, "lets in everybody"},
		{`'github:**'`, `repository = "acme*/app"`, "lets in everybody"},
		{`'github:**'`, `repository = ["acme/app", "*/app"]`, "lets in everybody"},
		{`'github:**'`, `repository_owner = "acme*"`, "lets in everybody"},
		{`'github:**'`, `repository_id = "12*"`, "lets in everybody"},
		{`'github:**'`, `project_id = "1"`, "lets in everybody"}, // of the other forge
		{`'gitlab:**'`, ``, "lets in everybody"},
		{`'gitlab:**'`, `ref_protected = true, pipeline_source = "push"`, "lets in everybody"},
		{`'gitlab:**'`, `job_project_path = "acme/app"`, "lets in everybody"}, // a fork's merge request
		{`'gitlab:**'`, `namespace_path = "acme*"`, "lets in everybody"},
		{`'gitlab:project_path:**'`, ``, "lets in everybody"},

		{`'github:**'`, `repository_id = 1, ref = "refs/heads/main"`, ""},
		{`'github:**'`, `repository_id = 1`, "every branch, pull request and event"},
		{`'github:**'`, `repository_id = 1, ref = "**"`, "every branch, pull request and event"},
		{`'github:**'`, `repository_id = 1, environment = ["production", "*"]`, "every branch, pull request and event"},
		{`'github:**'`, `repository_owner_id = "1", repository = "*/app", event_name = "push"`, ""},
		{`'github:**'`, `enterprise_id = "1", job_workflow_ref = "acme/ci/.github/workflows/x.yml@refs/heads/main"`, ""},
		{`'github:**'`, `repository = "acme/*"`, "names only"},
		{`'github:**'`, `repository_owner = "acme"`, "names only"},
		{`'github:repo:acme/*:ref:refs/heads/main'`, ``, "names only"},
		{`'github:repo:acme@123/app@456:ref:refs/heads/main'`, ``, ""},
		{`'github:repo:acme@123/app@456:**'`, ``, "every branch, pull request and event"},
		{`'gitlab:**'`, `project_id = "1", ref_protected = true`, ""},
		{`'gitlab:**'`, `project_id = "1"`, "every branch, pull request and event"},
		{`'gitlab:**'`, `namespace_path = "acme/**"`, "names only"},
		{`'gitlab:project_path:acme/app:ref_type:branch:ref:main'`, ``, "names only"},
		{`'cluster:**'`, ``, ""},
		{`'spiffe://**'`, ``, ""},
	} {
		claims := ""
		if test.claims != "" {
			claims = "claims = { " + test.claims + " }"
		}
		p, err := parse("p", []byte(ruleFor(test.identities, claims)), forgeIssuers)
		got := ""
		if err != nil {
			got = err.Error()
		} else {
			got = strings.Join(p.Warnings, "\n")
		}
		refused := strings.HasPrefix(test.want, "lets") || strings.HasPrefix(test.want, "use")
		if (err != nil) != refused || !strings.Contains(got, test.want) || test.want == "" && got != "" {
			t.Errorf("%s %s: want %q: %s", test.identities, test.claims, test.want, got)
		}
		// A rule that denies needs no restriction.
		if test.want == "lets in everybody" {
			if _, err := parse("p", []byte(ruleFor(test.identities, claims+"\ndeny = true")), forgeIssuers); err != nil && !strings.Contains(err.Error(), "only tokens") {
				t.Errorf("deny: %v", err)
			}
		}
	}
	// Elsewhere everybody has an account that an admin gave them.
	own := Issuers{"github": "https://github.example.com/_services/token"}
	if _, err := parse("p", []byte(ruleFor(`'github:**'`, "")), own); err != nil {
		t.Error(err)
	}
	for _, action := range []string{"export", "admin"} {
		rule := strings.Replace(ruleFor(`'github:**'`, "claims = { repository_id = 1, ref = 'refs/heads/main' }"), "wrap", action, 1)
		if p, err := parse("p", []byte(rule), forgeIssuers); err != nil || len(p.Warnings) != 1 || !strings.Contains(p.Warnings[0], "lets CI jobs "+action+" KEKs: wrap is enough") {
			t.Errorf("%v %v", p, err)
		}
	}
}

// TestDenialByNamesThatChangeIsWarnedOf has a repository that is denied something change its
// names and the form of its subject.
func TestDenialByNamesThatChangeIsWarnedOf(t *testing.T) {
	allow := ruleFor(`'github:**'`, "claims = { repository_owner_id = 4711, event_name = 'push' }")
	claims := Claims{"repository_owner_id": {"4711"}, "event_name": {"push"}, "repository_id": {"5"}, "repository": {"acme/old"}, "actor": {"mallory"}, "actor_id": {"6"}}
	before := Principal{Identity: "github:repo:acme/old:ref:refs/heads/main", Claims: claims}
	after := Principal{Identity: "github:repository_id:5", Claims: maps.Clone(claims)}
	after.Claims["repository"], after.Claims["actor"] = []string{"acme/new"}, []string{"mallory2"}
	for _, test := range []struct {
		identity, claims string
		escapes          bool
	}{
		{`github:repo:acme/old:**`, ``, true},
		{`github:**:ref:refs/heads/main`, ``, true},
		{`github:repo:acme/old:**`, `repository_id = 5`, true},
		{`github:**`, `repository = "acme/old"`, true},
		{`**`, `repository = "acme/old", repository_id = 5`, true},
		{`github:**`, `actor = "mallory"`, true},
		{`github:**`, `repository_id = 5`, false},
		{`**`, `actor_id = 6`, false},
		{`github:**`, ``, false},
	} {
		lines := "deny = true"
		if test.claims != "" {
			lines += "\nclaims = { " + test.claims + " }"
		}
		p, err := parse("p", []byte(allow+ruleFor("'"+test.identity+"'", lines)), forgeIssuers)
		if err != nil {
			t.Fatal(err)
		}
		if warned := strings.Contains(strings.Join(p.Warnings, "\n"), "rule 2: "); warned != test.escapes {
			t.Errorf("%s %s: %q", test.identity, test.claims, p.Warnings)
		}
		if p.Decide(before, "team-a", Wrap, anyTime).Allowed || p.Decide(after, "team-a", Wrap, anyTime).Allowed != test.escapes {
			t.Errorf("%s %s: allowed before, or escapes: %t", test.identity, test.claims, !test.escapes)
		}
	}
}

// TestPatternOfAnyBranchIsWarnedOf has a branch whose name looks like another one.
func TestPatternOfAnyBranchIsWarnedOf(t *testing.T) {
	who := Principal{Identity: "github:repo:acme/app:ref:refs/heads/x@refs/heads/main",
		Claims: Claims{"repository_id": {"1"}, "workflow_ref": {"acme/app/.github/workflows/evil.yml@refs/heads/x@refs/heads/main"}}}
	for pattern, gets := range map[string]bool{
		"acme/app/**@refs/heads/main":                  true,
		"acme/app/.github/workflows/*@refs/heads/main": false,
		"acme/app/.github/workflows/x.yml@refs/**":     false,
	} {
		p, err := parse("p", []byte(ruleFor(`'github:**', 'github:repo:acme/**'`, "claims = { repository_id = 1, workflow_ref = '"+pattern+"' }")), forgeIssuers)
		if err != nil {
			t.Fatal(err)
		}
		warned := len(p.Warnings) == 1 && strings.Contains(p.Warnings[0], "** before the @ of workflow_ref")
		if allowed := p.Decide(who, "team-a", Wrap, anyTime).Allowed; allowed != gets || warned != gets {
			t.Errorf("%s: allowed: %t, %q", pattern, allowed, p.Warnings)
		}
	}
}

func TestGrantsSayWhatATokenLacks(t *testing.T) {
	p, err := parse("p", []byte(ruleFor("'cluster:**'", "claims = { a = 1 }")+ruleFor("'cluster:**'", "claims = { a = 2 }")+ruleFor("'cluster:x'", "deny = true")+
		ruleFor("'cluster:**'", "not-after = 2020-01-01T00:00:00Z")+ruleFor("'uid:1'", "")), nil)
	if err != nil {
		t.Fatal(err)
	}
	grants := p.Grants(Principal{Identity: "cluster:x", Claims: Claims{"a": {"1"}}}, time.Unix(1_800_000_000, 0))
	if len(grants) != 3 || grants[0].Unmet != nil || len(grants[1].Unmet) != 1 || !grants[2].Deny || grants[2].Rule != 3 {
		t.Errorf("%+v", grants)
	}
}

// FuzzStrangersOfAForge tries rules and tokens: what the policy takes must not let in a
// repository that the rule does not name.
func FuzzStrangersOfAForge(f *testing.F) {
	f.Add("github:**", "repository", "acme/*", "environment:production", "main")
	f.Add("github:repo:acme/*:ref:**", "ref", "**", "repo:acme", "x")
	f.Add("g**", "repository_id", "12", "actor:x", "x")
	f.Add("**:ref:refs/heads/main", "repository_owner", "acme", "a:ref:refs/heads/main", "x")
	f.Add("gitlab:project_path:acme/**", "project_path", "acme/**", "repository_id:1", "y")
	f.Fuzz(func(t *testing.T, identity, name, pattern, subject, other string) {
		for _, s := range []string{identity, pattern} {
			if strings.Contains(s, "mallory") || strings.Contains(s, "666") || strings.ContainsAny(s, "'\n\r") {
				return
			}
		}
		p, err := parse("p", []byte(ruleFor("'"+identity+"'", "[rule.claims]\n'"+name+"' = '"+pattern+"'")), forgeIssuers)
		if err != nil || strings.HasPrefix(identity, "cluster") {
			return
		}
		claims := Claims{"repository": {"mallory/" + other}, "repository_owner": {"mallory"}, "repository_id": {"666"}, "repository_owner_id": {"666"}, "ref": {other}, "job_workflow_ref": {other}, "environment": {other}}
		gitLab := Claims{"project_path": {"mallory/" + other}, "namespace_path": {"mallory"}, "project_id": {"666"}, "namespace_id": {"666"}, "job_project_path": {other}, "ref": {other}}
		// What their owner makes of a subject begins with the name of a claim, or with their repository.
		own := subject
		if strings.HasPrefix(own, "repo:") || strings.HasPrefix(own, "project_path:") {
			own = "actor:" + own
		}
		for _, who := range []Principal{
			{Identity: "github:" + own, Claims: claims}, {Identity: "github:repo:mallory/" + other + ":" + subject, Claims: claims}, {Identity: "gitlab:project_path:mallory/" + other + ":" + subject, Claims: gitLab},
		} {
			if p.Decide(who, "team-a", Wrap, anyTime).Allowed {
				t.Errorf("%q with %s = %q lets in %+v", identity, name, pattern, who)
			}
		}
	})
}

// Package policy decides who may do what with which key encryption key (KEK).
package policy

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/internal/glob"
	"github.com/ctrlplane/pilot/internal/regular"
	"github.com/ctrlplane/pilot/internal/tomlfile"
)

// Action is what an identity wants to do with a KEK.
type Action string

// What can be done with a KEK.
const (
	Wrap   Action = "wrap"   // have the broker wrap layer keys
	Unwrap Action = "unwrap" // have the broker unwrap them
	Export Action = "export" // get the KEK itself, to wrap and unwrap with
	Public Action = "public" // get its public half, to wrap for it without the broker
	Admin  Action = "admin"  // create, rotate, disable, destroy, revoke, list
)

// Actions are all there are.
var Actions = []Action{Wrap, Unwrap, Export, Public, Admin}

// Policy is what a file of rules says. What no rule allows is denied.
type Policy struct {
	name   string
	rules  []rule
	limits []limit

	// Warnings say which rules can come to allow more than they look like.
	Warnings []string
}

// rule allows, or with Deny forbids, each of its identities each of its
// actions with each of its KEKs. A rule that forbids beats all that allow.
type rule struct {
	Identities []string `toml:"identities"`
	// Claims are what the caller's token has to have besides, all of them. A pointer says
	// whether they are in the file: an empty table is decoded as a map that is nil.
	Claims *map[string]any `toml:"claims"`
	KEKs   []string        `toml:"keks"`
	// Workloads are those that nodes may vouch for. Without them, a rule that allows is for
	// requests without a workload.
	Workloads []string `toml:"workloads"`
	// Labels is a selector of the labels of the workloads' pods.
	Labels    *string   `toml:"labels"`
	Actions   []Action  `toml:"actions"`
	Deny      bool      `toml:"deny"`
	NotBefore time.Time `toml:"not-before"`
	NotAfter  time.Time `toml:"not-after"`

	number   int      // in the file, from 1
	claims   []claim  // Claims, as they are compared
	selector selector // Labels, likewise
}

// limit is how many requests an identity may make.
type limit struct {
	Identities []string `toml:"identities"`
	PerSecond  float64  `toml:"per-second"`
	Burst      int      `toml:"burst"`
	// Connections is how many the identity may have open. Default:
	// defaultConnections.
	Connections int `toml:"connections"`
}

// The rate of an identity that no limit names.
const (
	defaultPerSecond = 100
	defaultBurst     = 200
	// defaultConnections is how many connections an identity may have open.
	defaultConnections = 4096
)

// Load reads the policy in a file. Issuers are those whose tokens are accepted: rules for
// other issuers are errors, unless it is nil, and so are rules that let in everybody who
// has a repository at a public one.
func Load(name string, issuers Issuers) (*Policy, error) {
	b, err := regular.ReadText(name, maxFile)
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	return parse(name, b, issuers)
}

// parse reads a policy from TOML, as [Load] does. Errors name the file and the line
// or rule.
func parse(name string, b []byte, issuers Issuers) (*Policy, error) {
	var file struct {
		Rule  []rule  `toml:"rule"`
		Limit []limit `toml:"limit"`
	}
	if err := tomlfile.Decode(name, b, &file); err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	p := &Policy{name: name, rules: file.Rule, limits: file.Limit}
	for i := range p.rules {
		p.rules[i].number = i + 1
		err := p.rules[i].check(issuers.names())
		var warnings []string
		if err == nil {
			warnings, err = p.rules[i].checkForges(issuers)
		}
		if err != nil {
			return nil, fmt.Errorf("policy: %s: rule %d: %w", name, i+1, err)
		}
		p.Warnings = append(p.Warnings, warnings...)
		if warning := p.rules[i].labelsWarning(); warning != "" {
			p.Warnings = append(p.Warnings, warning)
		}
	}
	for i := range p.limits {
		if err := p.limits[i].check(issuers.names()); err != nil {
			return nil, fmt.Errorf("policy: %s: limit %d: %w", name, i+1, err)
		}
	}
	if len(file.Rule) == 0 {
		return nil, fmt.Errorf("policy: %s has no rules, as while it is written or after it was cut off: a rule with deny = true denies everything", name)
	}
	return p, nil
}

func (r *rule) check(issuers []string) error {
	if len(r.Identities) == 0 || len(r.KEKs) == 0 || len(r.Actions) == 0 {
		return errors.New("it needs identities, keks and actions")
	}
	for _, a := range r.Actions {
		if !slices.Contains(Actions, a) {
			return fmt.Errorf("%q is no action: there are wrap, unwrap, export, public and admin", a)
		}
	}
	if err := canonicalPatterns(r.Identities, issuers); err != nil {
		return err
	}
	if r.Claims != nil {
		var err error
		if r.claims, err = wantedClaims(*r.Claims); err != nil {
			return err
		}
	}
	for _, identity := range r.Identities {
		if len(r.claims) > 0 && !mayBeOfIssuer(identity) {
			return fmt.Errorf("%q never has the claims of the rule: only tokens have claims", identity)
		}
	}
	if err := checkPatterns(r.KEKs); err != nil {
		return err
	}
	if err := r.checkWorkloads(); err != nil {
		return err
	}
	if err := r.checkLabels(); err != nil {
		return err
	}
	if !r.NotBefore.IsZero() && !r.NotAfter.IsZero() && !r.NotAfter.After(r.NotBefore) {
		return errors.New("not-after is not after not-before")
	}
	return nil
}

func (l *limit) check(issuers []string) error {
	if len(l.Identities) == 0 {
		return errors.New("it needs identities")
	}
	if !(l.PerSecond > 0) || l.Burst < 1 {
		return errors.New("per-second has to be above 0, and burst at least 1")
	}
	if l.Connections < 0 {
		return errors.New("connections has to be at least 1")
	}
	return canonicalPatterns(l.Identities, issuers)
}

// canonicalPatterns replaces patterns of identities by what they are compared as.
func canonicalPatterns(patterns, issuers []string) error {
	if err := checkPatterns(patterns); err != nil {
		return err
	}
	for i, p := range patterns {
		var err error
		if patterns[i], err = canonicalPattern(p, issuers); err != nil {
			return err
		}
	}
	return nil
}

func checkPatterns(patterns []string) error {
	for _, p := range patterns {
		if p == "" {
			return errors.New("an empty name matches nothing")
		}
		if strings.Contains(p, "***") {
			return fmt.Errorf("%q: use * for a part of a name without slashes, ** for any", p)
		}
	}
	return nil
}

// Verdict is what a policy says to one request.
type Verdict struct {
	Allowed bool
	// Reason says which rule decided, or which came close, for the audit log
	// and for the author of the policy. It is not for the caller that was denied.
	Reason string
}

// Decide says whether who may do action with kek at the time now.
func (p *Policy) Decide(who Principal, kek string, action Action, now time.Time) Verdict {
	var allowing *rule
	var expired, early *rule
	for i := range p.rules {
		r := &p.rules[i]
		if !slices.Contains(r.Actions, action) || !matchAny(r.KEKs, kek) || !r.isFor(who) || !r.isForWorkload(who) {
			continue
		}
		switch {
		case !r.NotBefore.IsZero() && now.Before(r.NotBefore):
			early = r
		case !r.NotAfter.IsZero() && !now.Before(r.NotAfter):
			expired = r
		case r.Deny:
			return Verdict{false, fmt.Sprintf("%s of %s denies it", r, p.name)}
		case allowing == nil:
			allowing = r
		}
	}
	switch {
	case allowing != nil:
		return Verdict{true, fmt.Sprintf("%s of %s allows it", allowing, p.name)}
	case early != nil && !early.Deny:
		return Verdict{false, fmt.Sprintf("%s of %s would allow it, from %s on", early, p.name, early.NotBefore.Format(time.RFC3339))}
	case expired != nil && !expired.Deny:
		return Verdict{false, fmt.Sprintf("%s of %s allowed it, until %s", expired, p.name, expired.NotAfter.Format(time.RFC3339))}
	}
	return Verdict{false, p.whyNot(who, kek, action, now)}
}

// unmet returns what claims lacks for the rule.
func (r *rule) unmet(claims Claims) (list []string) {
	for _, c := range r.claims {
		if !c.matches(claims) {
			list = append(list, c.unmet(claims))
		}
	}
	return list
}

// isFor reports whether a rule's identities and claims match, for some workload or none.
func (r *rule) isFor(who Principal) bool {
	return matchIdentity(r.Identities, who.Identity) && len(r.unmet(who.Claims)) == 0
}

// Names reports whether a rule allows who anything at the time now.
func (p *Policy) Names(who Principal, now time.Time) bool {
	return slices.ContainsFunc(p.rules, func(r rule) bool { return !r.Deny && r.holds(now) && r.isFor(who) })
}

// ClaimNames returns the names of the claims that rules want.
func (p *Policy) ClaimNames() (names []string) {
	for _, r := range p.rules {
		for _, c := range r.claims {
			names = append(names, c.name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// Usable returns a function that reports whether who may do anything at all with a KEK at
// the time now, for some workload or none.
func (p *Policy) Usable(who Principal, now time.Time) func(kek string) bool {
	var rules []*rule
	for i := range p.rules {
		if r := &p.rules[i]; r.holds(now) && r.isFor(who) {
			rules = append(rules, r)
		}
	}
	return func(kek string) bool {
		var allowed, denied []Action
		for _, r := range rules {
			switch {
			case !matchAny(r.KEKs, kek), r.Deny && r.Workloads != nil:
			case r.Deny:
				denied = append(denied, r.Actions...)
			default:
				allowed = append(allowed, r.Actions...)
			}
		}
		return slices.ContainsFunc(allowed, func(a Action) bool { return !slices.Contains(denied, a) })
	}
}

// Admins reports whether who may admin KEKs at the time now, whether there are
// any of those names or not. Only a rule that denies it that for all KEKs counts
// against one that allows it.
func (p *Policy) Admins(who Principal, now time.Time) bool {
	admins := false
	for i := range p.rules {
		r := &p.rules[i]
		switch {
		case !r.holds(now) || !slices.Contains(r.Actions, Admin) || !r.isFor(who):
		case !r.Deny:
			admins = true
		case slices.Contains(r.KEKs, "**"):
			return false
		}
	}
	return admins
}

// holds reports whether the time now is between not-before and not-after.
func (r *rule) holds(now time.Time) bool {
	return (r.NotBefore.IsZero() || !now.Before(r.NotBefore)) && (r.NotAfter.IsZero() || now.Before(r.NotAfter))
}

// Limit returns how many requests a second identity may make, and how many at
// once.
func (p *Policy) Limit(identity string) (perSecond float64, burst int) {
	for _, l := range p.limits {
		if matchIdentity(l.Identities, identity) {
			return l.PerSecond, l.Burst
		}
	}
	return defaultPerSecond, defaultBurst
}

// Connections returns how many connections identity may have open.
func (p *Policy) Connections(identity string) int {
	for _, l := range p.limits {
		if matchIdentity(l.Identities, identity) {
			return cmp.Or(l.Connections, defaultConnections)
		}
	}
	return defaultConnections
}

func (r *rule) String() string { return fmt.Sprintf("rule %d", r.number) }

func joined(actions []Action) string {
	slices.Sort(actions)
	var names []string
	for _, a := range slices.Compact(actions) {
		names = append(names, string(a))
	}
	return strings.Join(names, ", ")
}

// matchIdentity reports whether patterns name an identity or its group.
func matchIdentity(patterns []string, identity string) bool {
	group := Group(identity)
	return matchAny(patterns, identity) || group != "" && matchAny(patterns, group)
}

func matchAny(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return glob.MatchPath(p, name) })
}

// Local is the policy of a broker without a policy file: only these identities may use
// the KEKs, and they may use all.
func Local(identities ...string) *Policy {
	return &Policy{name: "the built-in policy", rules: []rule{
		{Identities: identities, KEKs: []string{"**"}, Actions: []Action{Wrap, Unwrap, Export, Public}, number: 1},
		{Identities: identities, KEKs: []string{"**"}, Actions: []Action{Unwrap}, Workloads: []string{"**"}, number: 2},
	}}
}

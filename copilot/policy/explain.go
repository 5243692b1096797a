package policy

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// whyNot says which of the things that a rule has to match is the one that no rule of the
// others has.
func (p *Policy) whyNot(who Principal, kek string, action Action, now time.Time) string {
	var both []Action
	var other *rule // of those that are for another workload, the closest
	var otherWhy string
	otherRank := 0
	var closest *rule // of those that want other claims
	var unmet []string
	known, likely := false, 0
	for i := range p.rules {
		r := &p.rules[i]
		if r.Deny || !matchIdentity(r.Identities, who.Identity) {
			continue
		}
		if missing := r.unmet(who.Claims); len(missing) > 0 {
			like := 0
			if matchAny(r.KEKs, kek) {
				like = 1
				if slices.Contains(r.Actions, action) {
					like = 2
				}
			}
			if r.holds(now) && (closest == nil || like > likely || like == likely && len(missing) < len(unmet)) {
				closest, unmet, likely = r, missing, like
			}
			continue
		}
		known = true
		if !r.isForWorkload(who) {
			if why, rank := r.otherWorkload(who); rank > otherRank && r.holds(now) && matchAny(r.KEKs, kek) && slices.Contains(r.Actions, action) {
				other, otherWhy, otherRank = r, why, rank
			}
			continue
		}
		if matchAny(r.KEKs, kek) {
			both = append(both, r.Actions...)
		}
	}
	switch {
	case closest != nil && (likely == 2 || !known):
		return fmt.Sprintf("%s of %s wants other claims: %s", closest, p.name, strings.Join(unmet, "; "))
	case other != nil:
		return fmt.Sprintf("%s of %s %s", other, p.name, otherWhy)
	case len(both) > 0:
		return fmt.Sprintf("no rule of %s allows %s: those for %s with %s allow %s", p.name, action, who.Identity, kek, joined(both))
	case known:
		return fmt.Sprintf("no rule of %s for %s names the KEK %s", p.name, who.Identity, kek)
	}
	return fmt.Sprintf("no rule of %s names %s", p.name, who.Identity)
}

// Grant is what one rule says to a caller.
type Grant struct {
	Rule    int      `json:"rule"` // in the file, from 1
	KEKs    []string `json:"keks"`
	Actions []Action `json:"actions"`
	Deny    bool     `json:"deny,omitempty"`
	// Workloads are those that the rule is for, if it is not for the node itself.
	Workloads []string `json:"workloads,omitempty"`
	// Labels is the selector of the labels that their pods have to have.
	Labels string `json:"labels,omitempty"`
	// Unmet are the claims that the rule wants besides and the caller's token does not
	// have. The rule does not count then.
	Unmet []string `json:"unmet,omitempty"`
}

// Grants returns the rules that name who at the time now, in their order.
func (p *Policy) Grants(who Principal, now time.Time) (list []Grant) {
	for _, r := range p.rules {
		if r.holds(now) && matchIdentity(r.Identities, who.Identity) {
			g := Grant{Rule: r.number, KEKs: r.KEKs, Actions: r.Actions, Deny: r.Deny, Workloads: r.Workloads, Unmet: r.unmet(who.Claims)}
			if r.Labels != nil {
				g.Labels = *r.Labels
			}
			list = append(list, g)
		}
	}
	return list
}

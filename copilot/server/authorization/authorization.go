// Package authorization answers what a caller of the broker may do: by the policy, by
// revocations, and everything for the store's owner.
package authorization

import (
	"fmt"
	"time"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/policy"
)

// Denial is the error of a caller that may not do what it asks for.
type Denial struct {
	who string
	// Reason is for the audit log only.
	Reason string
}

// Error is the same for a KEK that exists and for one that doesn't.
func (d *Denial) Error() string {
	return fmt.Sprintf("%s may not, or there is no such KEK: on the broker's machine, \"copilot policy check\" says why", d.who)
}

// Caller is what one principal may do now.
type Caller struct {
	who    policy.Principal
	policy *policy.Policy
	now    time.Time
	owner  bool
}

// ByPolicy returns what the policy and revocations let a principal do.
func ByPolicy(p *policy.Policy, who policy.Principal) Caller {
	return Caller{who: who, policy: p, now: time.Now()}
}

// Owner returns the rights of those that can read the store: everything.
func Owner(who policy.Principal) Caller { return Caller{who: who, owner: true} }

// May returns a [*Denial] unless the caller may do one of the actions with a KEK.
func (c Caller) May(kek string, actions ...policy.Action) error {
	if c.owner {
		return nil
	}
	var reason string
	for i, action := range actions {
		v := c.policy.Decide(c.who, kek, action, c.now)
		if v.Allowed {
			return nil
		}
		if i == 0 {
			reason = v.Reason
		}
	}
	return c.denial(reason)
}

func (c Caller) denial(reason string) *Denial {
	who := c.who.Identity
	if c.who.Workload != "" {
		who += " for the workload " + c.who.Workload
	}
	return &Denial{who, reason}
}

// NotRevoked returns a [*Denial] if a KEK was revoked for the caller.
func (c Caller) NotRevoked(k keystore.KEK) error {
	if c.owner {
		return nil
	}
	if revoked := Revocation(k.Revoked, c.who.Identity); revoked != "" {
		return c.denial("the KEK was revoked for " + revoked)
	}
	return nil
}

// LabelKeys returns the keys of the pods' labels on which it depends whether the caller may
// do action with a KEK. It is not nil.
func (c Caller) LabelKeys(kek string, action policy.Action) []string {
	if c.owner {
		return []string{}
	}
	return c.policy.LabelKeys(c.who, kek, action)
}

// Admins reports whether the caller may admin KEKs.
func (c Caller) Admins() bool { return c.owner || c.policy.Admins(c.who, c.now) }

// Usable returns which KEKs the policy lets the caller do anything with.
func (c Caller) Usable() func(kek string) bool {
	if c.owner {
		return keystore.All
	}
	return c.policy.Usable(c.who, c.now)
}

// Revocation returns the identity, of those that a KEK was revoked for, that is the given
// one or its group, or "".
func Revocation(revoked []string, identity string) string {
	for _, r := range revoked {
		// Earlier versions stored identities as they were spelled.
		if canonical, err := policy.Canonical(r, nil); err == nil {
			r = canonical
		}
		if r != "" && (r == identity || r == policy.Group(identity)) {
			return r
		}
	}
	return ""
}

package authorization

import (
	"fmt"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/policy"
)

// NotRenewed is the error of a client whose certificate is not renewed.
type NotRenewed struct {
	// Reason is for the audit log only.
	Reason string
}

func (*NotRenewed) Error() string {
	return "this certificate is not renewed: the broker's audit log says why; \"copilot certs renew\" on its machine renews it all the same"
}

// CheckRenewal returns a [*NotRenewed] unless an identity is a machine's that may use one
// of the broker's KEKs, and none of them was revoked for it.
func CheckRenewal(p *policy.Policy, who string, keks []keystore.KEK) error {
	c := ByPolicy(p, policy.Principal{Identity: who})
	if p.Admins(c.who, c.now) { // also KEKs that are still to be created
		return &NotRenewed{who + " may admin KEKs: an admin's certificate is renewed on the broker's machine"}
	}
	may, usable := false, c.Usable()
	for _, k := range keks {
		// Also a KEK that the policy does not let it use any more.
		if Revocation(k.Revoked, who) != "" {
			return &NotRenewed{fmt.Sprintf("the KEK %s was revoked for %s", k.ID, who)}
		}
		may = may || usable(k.ID)
	}
	if !may {
		return &NotRenewed{"the policy lets " + who + " use no KEK"}
	}
	return nil
}

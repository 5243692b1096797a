package doctor

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/keyprovider/agekey"
)

// warnBeforePublicKey is how long before a public key's expiry the doctor warns: somebody has
// to print a new one and bring it to each machine.
const warnBeforePublicKey = 30 * 24 * time.Hour

// keyFileChecks are the checks of public-keys and age-identities, if they are set.
func (e *examination) keyFileChecks() (list []check) {
	if e.PublicKeys != nil {
		list = append(list, check{StepPublicKeys, []string{StepConfiguration}, 5 * time.Second, e.publicKeys})
	}
	if len(e.AgeIdentities) > 0 {
		list = append(list, check{StepAgeIdentities, []string{StepConfiguration}, 5 * time.Second, e.ageIdentities})
	}
	return list
}

// publicKeys verifies the public halves of KEKs that this machine wraps for.
func (e *examination) publicKeys(context.Context) Step {
	files, err := e.PublicKeys()
	if err != nil {
		return failed(err.Error(), "correct public-keys and public-keys-ca in "+e.Configuration)
	}
	step := Step{Result: OK}
	var details []string
	for _, f := range files {
		again := onBroker("copilot keys public "+f.KEK) + ", and write what it prints to " + f.Path + " here"
		switch {
		case f.Err != nil && f.KEK == "":
			step.Result = Failed
			details = append(details, fmt.Sprintf("%s can't be used: %s", f.Path, f.Err))
			step.Fix = append(step.Fix, "remove "+f.Path+", or write a new one with \"copilot keys public\"")
		case f.Err != nil:
			step.Result = Failed
			details = append(details, fmt.Sprintf("the public key of KEK %q in %s can't be used: %s", f.KEK, f.Path, f.Err))
			step.Fix = append(step.Fix, again)
		case time.Until(f.Expires) < warnBeforePublicKey:
			if step.Result == OK {
				step.Result = Warning
			}
			details = append(details, fmt.Sprintf("the public key of KEK %q in %s expires on %s", f.KEK, f.Path, f.Expires.UTC().Format(time.RFC3339)))
			step.Fix = append(step.Fix, again)
		}
	}
	if len(details) == 0 {
		details = append(details, fmt.Sprintf("%d public keys can be used for 30 days and longer", len(files)))
	}
	step.Detail = strings.Join(details, "; ")
	return step
}

// ageIdentities reads the files of identities, and checks who else can.
func (e *examination) ageIdentities(context.Context) Step {
	step := Step{Result: OK}
	var details []string
	for _, name := range e.AgeIdentities {
		exposed, err := agekey.CheckIdentities(name)
		switch {
		case err != nil:
			step.Result = Failed
			details = append(details, fmt.Sprintf("age-identities: %s", err))
			step.Fix = append(step.Fix, "correct "+name+", or age-identities in "+e.Configuration)
		case exposed != nil:
			if step.Result == OK {
				step.Result = Warning
			}
			details = append(details, exposed.Error())
			step.Fix = append(step.Fix, "chmod 0600 "+name)
		}
	}
	if len(details) == 0 {
		details = append(details, fmt.Sprintf("%d files of identities can be used", len(e.AgeIdentities)))
	}
	step.Detail = strings.Join(details, "; ")
	return step
}

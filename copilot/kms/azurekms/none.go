//go:build no_azurekms

package azurekms

import "github.com/ctrlplane/pilot/copilot/kms"

// Types returns none: this program was built without them.
func Types() kms.Types { return nil }

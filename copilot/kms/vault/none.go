//go:build no_vault

package vault

import "github.com/ctrlplane/pilot/copilot/kms"

// Types returns none: this program was built without them.
func Types() kms.Types { return nil }

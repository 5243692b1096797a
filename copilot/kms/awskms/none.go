//go:build no_awskms

package awskms

import "github.com/ctrlplane/pilot/copilot/kms"

// Types returns none: this program was built without them.
func Types() kms.Types { return nil }

//go:build !linux || no_tpm

package tpm

import "github.com/ctrlplane/pilot/copilot/kms"

// Types returns no types: this copilot was built without TPMs.
func Types() kms.Types { return nil }

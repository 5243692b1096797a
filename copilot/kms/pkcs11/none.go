//go:build !linux || !cgo || no_pkcs11

package pkcs11

import "github.com/ctrlplane/pilot/copilot/kms"

// Types returns none: this program was built without them.
func Types() kms.Types { return nil }

// RunModule returns: there are no backends of type pkcs11.
func RunModule() {}

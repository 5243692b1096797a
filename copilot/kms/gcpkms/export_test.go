//go:build !no_gcpkms

package gcpkms

import (
	"google.golang.org/api/option"

	"github.com/ctrlplane/pilot/copilot/kms"
)

// AddOption has a backend not used yet do as option says.
func AddOption(b kms.Backend, o option.ClientOption) {
	gcp := b.(*backend)
	gcp.options = append(gcp.options, o)
}

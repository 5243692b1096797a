//go:build !no_azurekms

package azurekms

import (
	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"

	"github.com/ctrlplane/pilot/copilot/kms"
)

// New opens a vault with a credential and a transport of the caller's.
func New(url, algorithm string, credential azcore.TokenCredential, transport policy.Transporter) (kms.Wrapper, error) {
	return newBackend(settings{VaultURL: url, Algorithm: algorithm}, credential, transport)
}

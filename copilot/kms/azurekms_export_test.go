//go:build !no_azurekms

package kms

import (
	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
)

// NewAzure opens a vault with a credential and a transport of the caller's.
func NewAzure(url, algorithm string, credential azcore.TokenCredential, transport policy.Transporter) (Wrapper, error) {
	return newAzure(azureSettings{VaultURL: url, Algorithm: algorithm}, credential, transport)
}

package main

import (
	"maps"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/kms/awskms"
	"github.com/ctrlplane/pilot/copilot/kms/azurekms"
	"github.com/ctrlplane/pilot/copilot/kms/gcpkms"
	"github.com/ctrlplane/pilot/copilot/kms/pkcs11"
	"github.com/ctrlplane/pilot/copilot/kms/tpm"
	"github.com/ctrlplane/pilot/copilot/kms/vault"
)

// kmsTypes returns the kinds of KMS that this copilot was built with.
func kmsTypes() kms.Types {
	types := kms.Types{}
	for _, t := range []kms.Types{vault.Types(), pkcs11.Types(), awskms.Types(), gcpkms.Types(), azurekms.Types(), tpm.Types()} {
		maps.Copy(types, t)
	}
	return types
}

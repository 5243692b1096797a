// Package kms tests copilot with key management services and HSMs.
package kms

import (
	"os"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

func TestMain(m *testing.M) {
	os.Exit(harness.Main(m, harness.Pilot, harness.Copilot, harness.Debian13, harness.SoftHSM, harness.NSS, harness.OpenCryptoki,
		harness.LocalKMS, harness.Vault, harness.SWTPM))
}

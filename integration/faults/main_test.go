// Package faults tests what happens when the broker, the network, the disk or
// memory fail.
package faults

import (
	"os"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

func TestMain(m *testing.M) {
	os.Exit(harness.Main(m, harness.Pilot, harness.Copilot, harness.CtrPilot, harness.Hello, harness.Containerd, harness.Registry,
		harness.IPRoute2, harness.Vault))
}

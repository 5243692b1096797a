//go:build node || packages

// Package install tests what pilot is installed from: packages, the node image
// and a DaemonSet.
package install

import (
	"os"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

func TestMain(m *testing.M) {
	os.Exit(harness.Main(m, harness.Pilot, harness.Copilot, harness.CtrPilot, harness.Hello, harness.Containerd, harness.Registry,
		harness.Debian13, harness.IPRoute2))
}

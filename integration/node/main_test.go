// Package node tests "pilot node", which installs and examines pilot on nodes.
package node

import (
	"os"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

func TestMain(m *testing.M) {
	os.Exit(harness.Main(m, harness.Pilot, harness.Copilot, harness.CtrPilot, harness.Hello, harness.Containerd, harness.Registry,
		harness.Debian13, harness.OpenSSL))
}

// Package docs tests what the documentation says: links, configurations and
// commands.
package docs

import (
	"os"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

func TestMain(m *testing.M) {
	os.Exit(harness.Main(m, harness.Pilot, harness.Copilot, harness.CtrPilot, harness.Hello, harness.Debian13, harness.OpenSSL, harness.Containerd, harness.Registry, harness.IPRoute2))
}

// Package broker tests copilot: its stores, certificates, policy, metrics and
// traces, and what pilot does with another program in its place.
package broker

import (
	"os"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

func TestMain(m *testing.M) {
	os.Exit(harness.Main(m, harness.Pilot, harness.Copilot, harness.CtrPilot, harness.Hello, harness.Containerd, harness.Registry,
		harness.Debian13, harness.OpenSSL))
}

// Package cluster tests copilot's manifests, and pilot in a Kubernetes cluster.
package cluster

import (
	"os"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

func TestMain(m *testing.M) {
	os.Exit(harness.Main(m, harness.Pilot, harness.Copilot, harness.CtrPilot, harness.Hello, harness.Containerd, harness.Registry,
		harness.OpenSSL, harness.IPRoute2))
}

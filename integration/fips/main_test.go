// Package fips tests pilot where only what FIPS 140-3 approves is allowed.
package fips

import (
	"os"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

func TestMain(m *testing.M) {
	os.Exit(harness.Main(m, harness.FIPSOnly, harness.Pilot, harness.Copilot, harness.CtrPilot, harness.Hello, harness.Containerd, harness.Registry, harness.OpenSSL))
}

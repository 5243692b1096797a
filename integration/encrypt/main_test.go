// Package encrypt tests how images are encrypted, rewrapped and pushed, by
// ctr-pilot and by other programs.
package encrypt

import (
	"os"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

func TestMain(m *testing.M) {
	os.Exit(harness.Main(m, harness.Pilot, harness.Copilot, harness.CtrPilot, harness.Hello, harness.Containerd, harness.Registry, harness.Distribution,
		harness.Debian13, harness.OpenSSL, harness.GPG, harness.SoftHSM))
}

// Package bench compares pilot with its peers, side by side.
package bench

import (
	"fmt"
	"os"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

func TestMain(m *testing.M) {
	code := harness.Main(m, harness.Pilot, harness.Copilot, harness.CtrPilot, harness.Hello, harness.Containerd, harness.Registry,
		harness.OpenSSL, harness.SoftHSM, harness.Debian13)
	if err := printRows(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		code = 1
	}
	os.Exit(code)
}

//go:build wine

// Package wine tests the client programs for Windows, which Wine runs.
package wine

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// programs is the directory of our programs for Windows.
var programs string

func TestMain(m *testing.M) {
	if _, err := os.Stat(filepath.Join(os.Getenv("PILOT_TOOLS"), "wine/usr/lib/wine/wine64")); err != nil {
		fmt.Fprintln(os.Stderr, "integration: Wine is missing: run \"make test-windows\"")
		os.Exit(1)
	}
	var err error
	if programs, err = os.MkdirTemp("", "pilot-windows-"); err != nil {
		panic(err)
	}
	build := exec.Command("go", "build", "-buildvcs=false", "-ldflags", "-s -w", "-o", programs+"/", "./cmd/pilot", "./cmd/copilot", "./ctr-pilot")
	build.Dir, build.Env = "../..", append(os.Environ(), "GOOS=windows", "CGO_ENABLED=0")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	code := 1
	if err := build.Run(); err == nil {
		code = harness.Main(m, harness.Pilot, harness.Copilot, harness.CtrPilot, harness.Hello)
	}
	os.RemoveAll(programs)
	os.Exit(code)
}

package main

import (
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/ctrlplane/pilot/internal/exit/exittest"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"ctr-pilot": func() { os.Exit(run()) }})
}

// TestScript tests what needs no containerd; integration/ has the rest.
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata/script", Cmds: exittest.Commands(), Condition: fipstest.Condition})
}

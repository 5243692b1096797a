package main

import (
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/ctrlplane/pilot/internal/exit/exittest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"copilot": func() { os.Exit(run()) }})
}

func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata/script", Cmds: exittest.Commands()})
}

package main

import (
	"os"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/ctrlplane/pilot/internal/exit/exittest"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"pilot": func() { os.Exit(run()) }})
}

func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata/script", Cmds: exittest.Commands(), Condition: fipstest.Condition})
}

// TestEachCommandShowsAnExample looks at the help of the program, and of each command that
// people run.
func TestEachCommandShowsAnExample(t *testing.T) {
	app := newApp()
	for _, c := range append(app.Commands, app) {
		for _, c := range append(c.Commands, c) {
			if c.Name != "version" && c.Name != "completion" && !strings.Contains(c.Description, "Example") {
				t.Errorf("%s shows no example", c.Name)
			}
		}
	}
}

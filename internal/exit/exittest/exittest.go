// Package exittest has a testscript command that checks exit statuses.
package exittest

import (
	"errors"
	"os/exec"
	"strconv"

	"github.com/rogpeppe/go-internal/testscript"
)

// Commands returns a command for scripts: "exits 3 copilot keys show nobody".
func Commands() map[string]func(*testscript.TestScript, bool, []string) {
	return map[string]func(*testscript.TestScript, bool, []string){"exits": func(ts *testscript.TestScript, neg bool, args []string) {
		if neg || len(args) < 2 {
			ts.Fatalf("usage: exits STATUS PROGRAM ARGUMENT…")
		}
		want, err := strconv.Atoi(args[0])
		ts.Check(err)
		status, err := 0, ts.Exec(args[1], args[2:]...)
		if e := new(exec.ExitError); errors.As(err, &e) {
			status = e.ExitCode()
		} else {
			ts.Check(err)
		}
		if status != want {
			ts.Fatalf("exit status %d, want %d", status, want)
		}
	}}
}

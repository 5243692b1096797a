//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/ctrlplane/pilot/node/install"
)

// plannedChange is what "node install --dry-run --json" prints of each file.
type plannedChange struct {
	Path   string `json:"path"`
	Action string `json:"action"` // write, remove or link
	Diff   string `json:"diff"`
}

// printPlan prints what an installation would change.
func printPlan(plan *install.Plan, asJSON bool) error {
	if !asJSON {
		for _, change := range plan.Changes {
			fmt.Print(change.Diff())
		}
		return nil
	}
	out := struct {
		Runtime string          `json:"runtime"`
		Changes []plannedChange `json:"changes"`
	}{plan.Runtime(), []plannedChange{}}
	for _, c := range plan.Changes {
		action := "write"
		switch {
		case c.Remove:
			action = "remove"
		case c.Link != "":
			action = "link"
		}
		out.Changes = append(out.Changes, plannedChange{c.Path, action, c.Diff()})
	}
	e := json.NewEncoder(os.Stdout)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(out)
}

//go:build man

package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/packaging/man"
)

// init makes this program print its manual page.
func init() {
	app := newApp()
	page := man.Page{Name: app.Name, Version: app.Version, Summary: app.Usage, Description: strings.TrimSuffix(app.Description, "\n\n"+exit.Help), Commands: man.Commands(app.Commands)}
	if err := page.Write(os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

//go:build man

package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/packaging/man"
)

// init makes this program print its manual page or, with an argument, the settings
// for that of pilot.toml.
func init() {
	app := newApp()
	var err error
	if len(os.Args) > 1 {
		conf := defaults()
		var options []man.Option
		for _, s := range settings {
			options = append(options, man.Option{Name: s.name, Usage: s.usage, Default: s.text(&conf)})
		}
		err = man.WriteSettings(os.Stdout, options)
	} else {
		page := man.Page{Name: app.Name, Version: app.Version, Summary: app.Usage, Description: strings.TrimSuffix(app.Description, "\n\n"+exit.Help), Commands: man.Commands(app.Commands)}
		err = page.Write(os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

//go:build man

package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/packaging/man"
)

// init makes this program print the manual page of what ctr does not have.
func init() {
	app := newApp()
	page := man.Page{Name: app.Name, Version: app.Version, Summary: app.Usage, Description: strings.Split(app.Description, "\n\n"+exit.Help)[0] + `

All other commands are ctr's own: ctr-pilot --help lists them.`}
	images := subcommand(app, "images")
	for _, name := range []string{encryptCommand.Name, decryptCommand.Name, rewrapCommand.Name, layerinfoCommand.Name} {
		page.Commands = append(page.Commands, man.Commands([]*cli.Command{subcommand(images, name)}, "images")...)
	}
	if err := page.Write(os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

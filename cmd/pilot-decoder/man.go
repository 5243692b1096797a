//go:build man

package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/ctrlplane/pilot/packaging/man"
	"github.com/ctrlplane/pilot/version"
)

// init makes this program print its manual page.
func init() {
	title, description, _ := strings.Cut(usage, "\n")
	name, summary, _ := strings.Cut(title, ": ")
	page := man.Page{Name: name, Version: version.Version, Summary: summary, Description: description}
	if err := page.Write(os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

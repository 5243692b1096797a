//go:build man

package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/version"
	"github.com/ctrlplane/pilot/packaging/man"
)

// init makes this program print its manual page.
func init() {
	parts := strings.SplitN(usage, "\n\n", 3)
	name, summary, _ := strings.Cut(parts[0], ": ")
	page := man.Page{Name: name, Version: version.Version, Summary: summary, Synopsis: parts[1], Description: strings.TrimSuffix(parts[2], "\n"+exit.Help+"\n")}
	if err := page.Write(os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

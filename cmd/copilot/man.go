//go:build man

package main

import (
	"fmt"
	"os"

	"github.com/ctrlplane/pilot/packaging/man"
)

// init makes this program print its manual page.
func init() {
	if err := man.NewPage(newApp()).Write(os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

//go:build man

package main

import (
	"fmt"
	"os"

	"github.com/ctrlplane/pilot/packaging/man"
)

// init makes this program print its manual page or, with an argument, the settings
// for that of pilot.toml.
func init() {
	var err error
	if len(os.Args) > 1 {
		conf := defaults()
		var options []man.Option
		for _, s := range settings {
			options = append(options, man.Option{Name: s.Name, Usage: s.Usage, Default: s.Text(&conf)})
		}
		err = man.WriteSettings(os.Stdout, options)
	} else {
		err = man.NewPage(newApp()).Write(os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

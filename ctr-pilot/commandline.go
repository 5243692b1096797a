package main

import (
	"context"
	"errors"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/mistyped"
	"github.com/ctrlplane/pilot/processor"
)

// explainUsage makes a command and those below it answer a usage error with one line
// instead of their help.
func explainUsage(c *cli.Command, path string) {
	c.OnUsageError = func(_ context.Context, c *cli.Command, err error, _ bool) error {
		return exit.CommandUsage(path, err.Error()+nearestFlag(c, os.Args[1:]))
	}
	if len(c.Commands) > 0 && c.Action == nil {
		c.Action = func(_ context.Context, c *cli.Command) error {
			name := c.Args().First()
			if name == "" && c.Root() == c {
				return cli.ShowRootCommandHelp(c)
			}
			if name == "" {
				return cli.ShowSubcommandHelp(c)
			}
			var names []string
			for _, sub := range c.Commands {
				names = append(names, sub.Names()...)
			}
			return exit.CommandUsage(path, "unknown command \""+name+"\""+mistyped.DidYouMean(name, names))
		}
	}
	for _, sub := range c.Commands {
		explainUsage(sub, path+" "+sub.Name)
	}
}

// nearestFlag asks whether another flag was meant by something in args that looks like a
// flag and is none of c's: the library's error for that has no type.
func nearestFlag(c *cli.Command, args []string) string {
	known := make(map[string]bool)
	for _, cmd := range c.Lineage() {
		for _, f := range cmd.Flags {
			for _, n := range f.Names() {
				known["--"+n] = true
			}
		}
	}
	names := slices.Sorted(maps.Keys(known))
	for _, arg := range args {
		name, _, _ := strings.Cut("--"+strings.TrimLeft(arg, "-"), "=")
		if arg == "--" {
			break
		}
		if question := mistyped.DidYouMean(name, names); question != "" && strings.HasPrefix(arg, "-") && !known[name] {
			return question
		}
	}
	return ""
}

// status returns the exit status for an error.
func status(err error) int {
	// What ran in a container, as ctr has it.
	if coder := cli.ExitCoder(nil); errors.As(err, &coder) {
		return coder.ExitCode()
	}
	if status := exit.Status(err); status != exit.Failed || !errors.Is(err, processor.ErrDenied) {
		return status
	}
	return exit.Denied
}

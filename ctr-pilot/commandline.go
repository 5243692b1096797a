package main

import (
	"context"
	"errors"
	"strings"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/mistyped"
	"github.com/ctrlplane/pilot/processor"
)

// explainUsage has a command and those below it answer a mistake with one line,
// and not with their help.
func explainUsage(c *cli.Command, path string) {
	c.OnUsageError = func(_ context.Context, c *cli.Command, err error, _ bool) error {
		return exit.CommandUsage(path, err.Error()+nearestFlag(c, err))
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

// nearestFlag asks whether another flag was meant than the one that err names.
func nearestFlag(c *cli.Command, err error) string {
	_, flag, ok := strings.Cut(err.Error(), "not defined: -") // the library has no type for it
	if !ok {
		return ""
	}
	var names []string
	for _, f := range c.Flags {
		for _, n := range f.Names() {
			names = append(names, "--"+n)
		}
	}
	return mistyped.DidYouMean("--"+strings.TrimLeft(flag, "-"), names)
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

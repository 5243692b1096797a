package commandline

import (
	"context"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
)

// LinuxOnly returns a command for a program on another system that has none of that name.
// Whatever its arguments are, its error says so, and instead what to do.
func LinuxOnly(name, instead string) *cli.Command {
	return &cli.Command{
		Name: name, Hidden: true, SkipFlagParsing: true, HideHelpCommand: true,
		Action: func(_ context.Context, c *cli.Command) error {
			return exit.Usagef("%s works on Linux only: %s", name, instead)
		},
	}
}

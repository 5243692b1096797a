package commandline

import (
	"os"

	"github.com/urfave/cli/v2"

	"github.com/ctrlplane/pilot/internal/exit"
)

// CompleteV2 is Complete for a program that is made with urfave/cli v2.
func CompleteV2(app *cli.App) *cli.App {
	app.Description += "\n\n" + exit.Help
	app.EnableBashCompletion = true
	app.ExitErrHandler = func(*cli.Context, error) {}
	app.Commands = append(app.Commands, &cli.Command{
		Name: "completion", Usage: completionUsage, ArgsUsage: completionArguments, Description: completionDescription(app.Name),
		Action: func(c *cli.Context) error { return printCompletion(app.Name, c.Args().Slice()) },
	}, &cli.Command{
		Name: "version", Usage: "print the version",
		Action: func(c *cli.Context) error {
			cli.ShowVersion(c)
			return nil
		},
	})
	app.OnUsageError = onUsageError(app.Name)
	setOnUsageError(app.Commands, app.Name)
	return app
}

// RunV2 is Run for a program that is made with urfave/cli v2.
func RunV2(app *cli.App) int {
	root := command{names: []string{app.Name}, flags: append(flagsOf(app.Flags), cli.VersionFlag), commands: commandsOfV2(app.Commands), helpCommand: !app.HideHelpCommand}
	args, err := arrange(root, os.Args)
	if err == nil {
		err = app.Run(args)
	}
	return report(app.Name, err)
}

func commandsOfV2(commands []*cli.Command) (list []command) {
	for _, c := range commands {
		list = append(list, command{c.Names(), flagsOf(c.Flags), commandsOfV2(c.Subcommands), !c.HideHelpCommand})
	}
	return list
}

func setOnUsageError(commands []*cli.Command, path string) {
	for _, c := range commands {
		c.OnUsageError = onUsageError(path + " " + c.Name)
		setOnUsageError(c.Subcommands, path+" "+c.Name)
	}
}

func onUsageError(path string) cli.OnUsageErrorFunc {
	return func(_ *cli.Context, err error, _ bool) error { return exit.CommandUsage(path, err.Error()) }
}

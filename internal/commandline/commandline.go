// Package commandline runs the programs that are made with urfave/cli v2, and adds
// what all of them have: flags after arguments, errors of one line, completion and
// version commands, and exit statuses.
package commandline

import (
	"fmt"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/packaging/completions"
)

// Complete adds to an application what all have.
func Complete(app *cli.App) *cli.App {
	app.Description += "\n\n" + exit.Help
	app.EnableBashCompletion = true
	app.ExitErrHandler = func(*cli.Context, error) {}
	app.Commands = append(app.Commands, completionCommand(app.Name), &cli.Command{
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

// Run runs an application with the arguments of this process, prints its error, and
// returns the exit status.
func Run(app *cli.App) int {
	args, err := arrange(app, os.Args)
	if err == nil {
		err = app.Run(args)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %s\n", app.Name, err)
	}
	return exit.Status(err)
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

func completionCommand(program string) *cli.Command {
	return &cli.Command{
		Name: "completion", Usage: "print a shell's completion script", ArgsUsage: "bash|zsh|fish",
		Description: fmt.Sprintf(`The packages have these scripts already. zsh reads its own from a file named
_%s in a directory of its fpath.

Example:
   source <(%[1]s completion bash)`, program),
		Action: func(c *cli.Context) error {
			if c.NArg() != 1 {
				return exit.Usagef("completion takes one shell, bash, zsh or fish, and got %d arguments", c.NArg())
			}
			script, err := completions.Script(c.Args().First(), program, completionFlag)
			if err != nil {
				return exit.Usagef("completion: %w", err)
			}
			_, err = fmt.Print(script)
			return err
		},
	}
}

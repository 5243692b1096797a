// Package commandline runs the programs that are made with urfave/cli, and adds what
// all of them have: errors of one line, completion and version commands, and exit
// statuses.
package commandline

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/packaging/completions"
)

// completionFlag is what shells append to ask what can follow. Scripts with it are
// installed, so it stays, though v3 of the library has another name for it.
const completionFlag = "--generate-bash-completion"

// Complete adds to a program what all of ours have: completion, a version command, and the
// description of exit statuses.
func Complete(app *cli.Command) *cli.Command {
	app.Description += "\n\n" + exit.Help
	app.EnableShellCompletion = true
	app.ExitErrHandler = func(context.Context, *cli.Command, error) {} // Run prints it
	app.Commands = append(app.Commands, completionCommand(app.Name), &cli.Command{
		Name: "version", Usage: "print the version",
		Action: func(_ context.Context, c *cli.Command) error {
			cli.ShowVersion(c.Root())
			return nil
		},
	})
	complete(app, app.Name)
	return app
}

func complete(c *cli.Command, path string) {
	c.OnUsageError = func(_ context.Context, _ *cli.Command, err error, _ bool) error {
		return exit.CommandUsage(path, err.Error())
	}
	c.ShellComplete = suggest
	for _, sub := range c.Commands {
		complete(sub, path+" "+sub.Name)
	}
}

// suggest prints what can follow: flags if the last word begins like one, else commands.
// The library's own does not see a flag after an argument.
func suggest(_ context.Context, c *cli.Command) {
	words := c.Args().Slice()
	if len(words) == 0 {
		for _, sub := range c.Commands {
			if !sub.Hidden {
				fmt.Printf("%s:%s\n", sub.Name, sub.Usage)
			}
		}
		return
	}
	last := words[len(words)-1]
	if !strings.HasPrefix(last, "-") {
		return
	}
	for _, f := range c.VisibleFlags() {
		name := dashed(f.Names()[0])
		if strings.HasPrefix(strings.TrimLeft(name, "-"), strings.TrimLeft(last, "-")) {
			usage := ""
			if d, ok := f.(cli.DocGenerationFlag); ok {
				usage = d.GetUsage()
			}
			fmt.Printf("%s:%s\n", name, usage)
		}
	}
}

// Run runs a program with the arguments of this process, prints its error, and returns
// the exit status.
func Run(app *cli.Command) int {
	parsed := false
	app.Before = func(ctx context.Context, _ *cli.Command) (context.Context, error) {
		parsed = true
		return ctx, nil
	}
	args, err := arguments(app, os.Args)
	if err == nil {
		err = app.Run(context.Background(), args)
	}
	if !parsed { // a variable, for which the library does not call OnUsageError
		err = exit.UsageError(err)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %s\n", app.Name, err)
	}
	return exit.Status(err)
}

// arguments returns args as the library understands them.
func arguments(app *cli.Command, args []string) ([]string, error) {
	if last := len(args) - 1; last > 0 && args[last] == completionFlag {
		return append(args[:last:last], "--generate-shell-completion"), nil
	}
	return arrange(app, args)
}

func completionCommand(program string) *cli.Command {
	return &cli.Command{
		Name: "completion", Usage: "print a shell's completion script", ArgsUsage: "bash|zsh|fish",
		Description: fmt.Sprintf(`The packages have these scripts already. zsh reads its own from a file named
_%s in a directory of its fpath.

Example:
   source <(%[1]s completion bash)`, program),
		Action: func(_ context.Context, c *cli.Command) error {
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

// Command copilot is the key broker: it keeps KEKs and hands them to pilot.
package main

import (
	"fmt"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/ctrlplane/pilot/copilot/kms/pkcs11"
	"github.com/ctrlplane/pilot/internal/commandline"
	"github.com/ctrlplane/pilot/internal/coredump"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/version"
)

func main() {
	os.Exit(run())
}

// run runs the command line and returns the exit status.
func run() int {
	pkcs11.RunModule()
	if err := coredump.Disable(); err != nil {
		fmt.Fprintf(os.Stderr, "copilot: core dumps can't be disabled: %s\n", err)
		return 1
	}
	return commandline.Run(newApp())
}

func newApp() *cli.App {
	app := &cli.App{
		Name:    "copilot",
		Usage:   "keep key encryption keys (KEKs) and hand them to pilot",
		Version: version.Version,
		Description: `copilot keeps KEKs, or reaches them in a key management system (KMS). It gives
pilot what it may have of them, decides that by a policy, and writes each
request down. "copilot init" makes a configuration to start from.`,
		Commands: []*cli.Command{initCommand, enrollCommand, certsCommand, serveCommand, keysCommand, storeCommand, policyCommand, auditCommand},
	}
	withoutHelpCommands(app.Commands)
	return commandline.Complete(app)
}

// withoutHelpCommands has commands take "h" and "help" for what they are given, such
// as a KEK of that name. --help is there.
func withoutHelpCommands(commands []*cli.Command) {
	for _, c := range commands {
		c.HideHelpCommand = true
		withoutHelpCommands(c.Subcommands)
	}
}

func noArguments(c *cli.Context) error {
	if c.NArg() > 0 {
		return exit.Usagef("%s takes no argument, and got %q", c.Command.Name, c.Args().First())
	}
	return nil
}

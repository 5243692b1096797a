// Command copilot is the key broker: it keeps KEKs, and releases them to pilot or wraps
// and unwraps with them.
package main

import (
	"fmt"
	"os"

	"github.com/urfave/cli/v3"

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

func newApp() *cli.Command {
	app := &cli.Command{
		Name:    "copilot",
		Usage:   "keep key encryption keys (KEKs) for pilot",
		Version: version.Text(),
		Description: `copilot keeps KEKs, or reaches them in a key management system (KMS). It releases
them to pilot, or wraps and unwraps with them, according to a policy, and audits
each request.

Example, a new broker and a node's certificate:
   copilot init --host copilot.example.com --trust-domain example.com
   systemctl enable --now copilot
   copilot keys create team-a
   copilot enroll worker-7`,
		Commands: []*cli.Command{initCommand, enrollCommand, certsCommand, serveCommand, keysCommand, masterCommand, storeCommand, backupCommand, restoreCommand, approvalsCommand, policyCommand, auditCommand},
	}
	withoutHelpCommands(app.Commands)
	return commandline.Complete(app)
}

// withoutHelpCommands makes "h" and "help" arguments of commands, such as the name of a
// KEK. --help remains.
func withoutHelpCommands(commands []*cli.Command) {
	for _, c := range commands {
		c.HideHelpCommand = true
		withoutHelpCommands(c.Commands)
	}
}

func noArguments(c *cli.Command) error {
	if c.NArg() > 0 {
		return exit.Usagef("%s takes no argument, and got %q", c.Name, c.Args().First())
	}
	return nil
}

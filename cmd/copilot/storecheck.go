//go:build linux

package main

import (
	"context"
	"fmt"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/internal/exit"
)

var storeCheckCommand = &cli.Command{
	Name: "check", Usage: "look for records that were put back as they were earlier, or deleted",
	Description: `Compares each record with what copilot has written last, and the store with its audit
log. A record that somebody put back in the database, so that a revocation or a
rotation is undone, is refused when it is used. copilot looks at all records when it
starts, and each minute at those that have changed.

The exit status is 3 if there are such records.

Example:
   copilot store check`,
	Flags: configFlags(jsonFlag()),
	Action: func(ctx context.Context, c *cli.Command) error {
		if err := noArguments(c); err != nil {
			return err
		}
		conf, err := configuration(c)
		if err != nil {
			return err
		}
		list, err := server.CheckStore(ctx, conf)
		if err != nil {
			return fmt.Errorf("store check: %w", withStatus(asOwner(err)))
		}
		if err := printRolledBack(c, list); err != nil {
			return err
		}
		if len(list) > 0 {
			return exit.DeniedError(fmt.Errorf("store check: %d records were put back or deleted: put the right ones back, or run \"copilot store acknowledge\"", len(list)))
		}
		if !c.Bool("json") {
			fmt.Println("no record was put back or deleted")
		}
		return nil
	},
}

var storeAcknowledgeCommand = &cli.Command{
	Name: "acknowledge", Usage: "use records that were put back on purpose, as they are now",
	Description: `Takes all records of the store as they are, such as after the database was restored from
a backup of its own. Check first which those are ("copilot store check"), and repeat
what was undone: revocations, and what was disabled or destroyed. The command is a line
of the audit log, with who acknowledges it and why.

Example:
   copilot store acknowledge --by 'Jane Doe' --reason 'database restored from 2026-01-31, ticket 4711'`,
	Flags: acknowledgementFlags("why the records were put back"),
	Action: func(ctx context.Context, c *cli.Command) error {
		if err := noArguments(c); err != nil {
			return err
		}
		conf, err := configuration(c)
		if err != nil {
			return err
		}
		list, err := server.AcknowledgeRollback(ctx, conf, acknowledgement(c))
		if err != nil {
			return fmt.Errorf("store acknowledge: %w", withStatus(asOwner(err)))
		}
		if len(list) == 0 && !c.Bool("json") {
			fmt.Println("no record was put back: there is nothing to acknowledge")
		}
		return printRolledBack(c, list)
	},
}

func printRolledBack(c *cli.Command, list []server.RolledBack) error {
	if c.Bool("json") {
		return printJSON(list)
	}
	for _, r := range list {
		fmt.Printf("%s: %s\n", r.Name, r.Reason)
	}
	return nil
}

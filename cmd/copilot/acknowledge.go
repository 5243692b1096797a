//go:build linux

package main

import (
	"context"
	"fmt"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/server"
)

var acknowledgeCommand = &cli.Command{
	Name: "acknowledge", Usage: "stop reporting lines of the audit log that were deleted on purpose",
	Description: `Acknowledges the chains that the log no longer has, such as those whose rows were
deleted from PostgreSQL: copilot does not report them at its start any more, and
"copilot audit verify" has them as notes. What goes missing later is reported again.
The command is itself a line of the audit log, with who acknowledges it and why.

It prints the last line of each chain that it acknowledges.

Example:
   copilot audit acknowledge --by 'Jane Doe' --reason 'rows of 2024 deleted, ticket 4711'`,
	Flags: acknowledgementFlags("why the lines are gone"),
	Action: func(ctx context.Context, c *cli.Command) error {
		if err := noArguments(c); err != nil {
			return err
		}
		conf, err := configuration(c)
		if err != nil {
			return err
		}
		heads, err := server.AcknowledgeAudit(ctx, conf, acknowledgement(c))
		if err != nil {
			return fmt.Errorf("audit acknowledge: %w", withStatus(asOwner(err)))
		}
		if c.Bool("json") {
			list := []string{}
			for _, h := range heads {
				list = append(list, h.String())
			}
			return printJSON(map[string][]string{"acknowledged": list})
		}
		if len(heads) == 0 {
			fmt.Println("no lines are missing: there is nothing to acknowledge")
		}
		for _, h := range heads {
			fmt.Println(h)
		}
		return nil
	},
}

// acknowledgementFlags returns the flags of a command that acknowledges something: see
// [acknowledgement].
func acknowledgementFlags(why string) []cli.Flag {
	return configFlags(
		&cli.StringFlag{Name: "by", Usage: "`NAME` of the person who acknowledges it", Required: true},
		&cli.StringFlag{Name: "reason", Usage: "`TEXT` that says " + why, Required: true},
		jsonFlag(),
	)
}

func acknowledgement(c *cli.Command) server.Acknowledgement {
	return server.Acknowledgement{By: c.String("by"), Reason: c.String("reason")}
}

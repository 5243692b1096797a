package main

import (
	"context"
	"fmt"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
)

var approvalsCommand = &cli.Command{
	Name:  "approvals",
	Usage: "list and approve what another admin wants to do",
	Description: `Operations in approvals.require of copilot.toml need two admins. The first one runs the
command, which makes a request and prints its id. The second one approves it, and then
the first one runs the same command again.

Example, for the second one:
   copilot approvals list
   copilot approvals approve k7f3q9mzx2ab`,
	Commands: []*cli.Command{
		{
			Name: "list", Usage: "list the requests that are not done yet",
			Description: `Lists the requests that the caller may approve, and those approved and not run yet.

Example:
   copilot approvals list`,
			Flags: keysFlags(),
			Action: func(ctx context.Context, c *cli.Command) error {
				if err := noArguments(c); err != nil {
					return err
				}
				keys, err := openKeys(ctx, c)
				if err != nil {
					return err
				}
				defer keys.Close()
				list, err := keys.Approvals(ctx)
				if err != nil {
					return fmt.Errorf("approvals list: %w", withStatus(err))
				}
				if c.Bool("json") {
					return printJSON(list)
				}
				table := newTable("ID", "OPERATION", "KEK", "BY", "APPROVED BY", "EXPIRES", "CONTENT")
				for _, r := range list {
					table.row(r.ID, r.Operation, orDash(r.KEK), r.By, orDash(r.Approved), date(r.Expires), r.Content)
				}
				return table.Flush()
			},
		},
		{
			Name: "approve", Usage: "approve a request of another admin", ArgsUsage: "ID",
			Description: `Read what "copilot approvals list" prints of it first. It takes the right "admin" for
the KEK, or for ** if the request is about the whole store, and another identity than
the one that has made the request.

Example:
   copilot approvals approve --server https://copilot.example.com:8443 --ca ca.pem --cert jane.pem --key jane-key.pem k7f3q9mzx2ab`,
			Flags: keysFlags(),
			Action: func(ctx context.Context, c *cli.Command) error {
				if c.NArg() != 1 {
					return exit.Usagef("approvals approve takes the ID of a request, and got %d arguments", c.NArg())
				}
				keys, err := openKeys(ctx, c)
				if err != nil {
					return err
				}
				defer keys.Close()
				r, err := keys.Approve(ctx, c.Args().First())
				if err != nil {
					return fmt.Errorf("approvals approve: %w", withStatus(err))
				}
				if c.Bool("json") {
					return printJSON(r)
				}
				operation := r.Operation
				if r.KEK != "" {
					operation += " of " + r.KEK
				}
				fmt.Printf("approved %s (%s): %s can run it until %s\n", operation, r.Content, r.By, date(r.Expires))
				return nil
			},
		},
	},
}

func orDash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}

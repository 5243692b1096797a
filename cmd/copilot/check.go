package main

import (
	"context"
	"fmt"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/server"
)

var checkKEKCommand = &cli.Command{
	Name: "check", Usage: "try a KEK: wrap a random key with it and unwrap that", ArgsUsage: "ID",
	Description: `Uses the KEK's KMS, if it is in one, and reports the version and how long it took,
or what is wrong and what to do. It is not counted as a wrap of the KEK, and is
in the audit log as "check". The exit status is 1 if the KEK can't be used.

Example:
   copilot keys check team-a`,
	Flags: keysFlags(),
	Action: onKEK(func(ctx context.Context, c *cli.Command, keys server.Keys, id string) error {
		found, err := keys.Check(ctx, id)
		if err != nil {
			return err
		}
		if c.Bool("json") {
			if err := printJSON(found); err != nil {
				return err
			}
		}
		where := "copilot's store"
		if found.Backend != "" {
			where = fmt.Sprintf("%s (%s, path %s)", found.Backend, found.Type, found.Path)
		}
		if !found.OK {
			return fmt.Errorf("in %s: %s", where, found.Error)
		}
		if !c.Bool("json") {
			fmt.Printf("%s works, in %s: version %d, wrap %.1f ms, unwrap %.1f ms\n", id, where, found.Version, found.WrapMillis, found.UnwrapMillis)
		}
		return nil
	}),
}

package main

import (
	"context"
	"slices"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
)

// alwaysLocal makes one of ctr's commands work as it does with --local on every
// containerd, and never through containerd's transfer service. containerd 1.6
// has no transfer service. That of 1.7 ignores --plain-http and --hosts-dir. That
// of 2.x pushes the whole index but only the blobs of --platform, which
// registries refuse, and its export may end before the archive is written.
func alwaysLocal(c *cli.Command) {
	i := slices.IndexFunc(c.Flags, func(f cli.Flag) bool { return slices.Contains(f.Names(), "local") })
	local := c.Flags[i].(*cli.BoolFlag)
	local.Value = true
	local.Usage = "Always on: ctr-pilot does not use containerd's transfer service"
	stock := c.Action
	c.Action = func(ctx context.Context, cmd *cli.Command) error {
		if !cmd.Bool("local") {
			return exit.Usagef("--local=false: ctr-pilot does not use containerd's transfer service: leave the flag out")
		}
		return stock(ctx, cmd)
	}
}

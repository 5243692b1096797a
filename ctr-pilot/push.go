package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/cmd/ctr/commands"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
)

// wrapPush makes ctr's push refuse flags that it would ignore.
func wrapPush(c *cli.Command) {
	c.Description += `
Images are pushed as with --local, so containerd's transfer service is not used.

Example:
   ctr-pilot images push registry.example.com/app:encrypted
   ctr-pilot images push registry.example.com/app:encrypted app:encrypted
`
	stock := c.Action
	c.Action = func(ctx context.Context, cmd *cli.Command) error {
		if err := checkPush(ctx, cmd); err != nil {
			return err
		}
		return explainRefusal(stock(ctx, cmd))
	}
	withStoredCredentials(c)
}

// checkPush returns an error if ctr's push would push something else than the
// flags say.
func checkPush(ctx context.Context, cmd *cli.Command) error {
	wanted := cmd.StringSlice("platform")
	switch {
	case cmd.NArg() > 2:
		return exit.Usagef("push takes a remote reference and the name of a local image, and got %q too", cmd.Args().Get(2))
	case cmd.IsSet("manifest") || cmd.IsSet("manifest-type"):
		// ctr sends a manifest of size 0, and succeeds when the registry refuses it.
		return exit.Usagef("--manifest and --manifest-type push nothing: name a local image, and --platform for one platform of it")
	case len(wanted) > 1:
		return exit.Usagef("push takes one --platform: leave it out to push all platforms")
	case len(wanted) == 0 || cmd.NArg() == 0:
		return nil
	}
	p, err := platforms.Parse(wanted[0])
	if err != nil {
		return fmt.Errorf("--platform %s: %w", wanted[0], err)
	}
	name := cmd.Args().Get(cmd.NArg() - 1)
	client, ctx, cancel, err := commands.NewClient(ctx, cmd)
	if err != nil {
		return err
	}
	defer cancel()
	defer client.Close()
	img, err := getImage(ctx, client, name)
	if err != nil {
		return err
	}
	has, err := images.Platforms(ctx, client.ContentStore(), img.Target)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(has, platforms.NewMatcher(p).Match) {
		return nil
	}
	var names []string
	for _, p := range has {
		names = append(names, platforms.FormatAll(p))
	}
	return fmt.Errorf("image %s has no platform %s: it has %s", name, wanted[0], strings.Join(names, ", "))
}

package main

import (
	"context"
	"fmt"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/cmd/ctr/commands"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/image"
)

// wrapUse makes one of ctr's commands that use an image check that the caller
// may decrypt it, and unpack it if it is not unpacked yet.
func wrapUse(c *cli.Command) {
	c.Flags = append(c.Flags, keyFlags()...)
	stock := c.Action
	c.Action = func(ctx context.Context, cmd *cli.Command) error {
		if !cmd.Bool("rootfs") && !cmd.IsSet("config") && cmd.Args().First() != "" {
			if err := prepareUse(ctx, cmd); err != nil {
				return err
			}
		}
		return stock(ctx, cmd)
	}
}

func prepareUse(ctx context.Context, cmd *cli.Command) error {
	client, ctx, cancel, err := commands.NewClient(ctx, cmd)
	if err != nil {
		return err
	}
	defer cancel()
	img, err := getImage(ctx, client, cmd.Args().First())
	if err != nil {
		return err
	}
	p, err := wantedPlatform(cmd)
	if err != nil {
		return err
	}
	encrypted, err := encryptedLayers(ctx, client, img.Target, p)
	if err != nil || len(encrypted) == 0 {
		return err
	}
	if !cmd.Bool("skip-decrypt-auth") {
		dc, err := decryptConfig(cmd, encrypted)
		if err != nil {
			return err
		}
		check, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		if err := image.CheckAccess(check, client.ContentStore(), img.Target, withProviders(cmd, dc), p); err != nil {
			return fmt.Errorf("you are not authorized to use %s (--skip-decrypt-auth leaves that to the node): %w", img.Name, err)
		}
	}
	unpacked, err := containerd.NewImageWithPlatform(client, img, p).IsUnpacked(ctx, cmd.String("snapshotter"))
	if err != nil || unpacked {
		return err
	}
	_, err = unpack(ctx, cmd, client, img, p)
	return err
}

package main

import (
	"context"
	"fmt"
	"os"
	"slices"

	"github.com/containerd/containerd/v2/cmd/ctr/commands"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/processor"
)

// wrapExport makes ctr's export warn of archives that some Dockers can't load.
func wrapExport(c *cli.Command) {
	stock := c.Action
	c.Action = func(ctx context.Context, cmd *cli.Command) error {
		if err := stock(ctx, cmd); err != nil || cmd.Bool("skip-manifest-json") {
			return err
		}
		return warnExported(ctx, cmd, cmd.Args().Tail())
	}
}

func warnExported(ctx context.Context, cmd *cli.Command, names []string) error {
	client, ctx, cancel, err := commands.NewClient(ctx, cmd)
	if err != nil {
		return err
	}
	defer cancel()
	for _, name := range names {
		img, err := getImage(ctx, client, name)
		if err != nil {
			return err
		}
		layers, err := layerDescriptors(ctx, client.ContentStore(), img.Target, image.Options{})
		if err != nil {
			return err
		}
		if slices.ContainsFunc(layers, func(l ocispec.Descriptor) bool { return processor.IsEncrypted(l.MediaType) }) {
			fmt.Fprintf(os.Stderr, "ctr-pilot: warning: %s is encrypted: \"docker load\" takes it into Docker's containerd image store, "+
				"and fails with \"invalid tar header\" where Docker uses a graph driver\n", name)
		}
	}
	return nil
}

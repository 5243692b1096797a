package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/cmd/ctr/commands/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/platforms"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
)

// wrapPull makes ctr's pull fetch images itself, as its --local does, and
// unpack encrypted ones.
func wrapPull(c *cli.Command) {
	c.Flags = append(append(c.Flags, keyFlags()...), passwordFlag())
	c.Description += credentialsHelp + `
Encrypted images are decrypted while they are unpacked, by containerd, with the
keys given here or those of the node. All images are fetched as with --local, so
the registry configuration of containerd's transfer service is not used.

Example:
   ctr-pilot images pull registry.example.com/app:encrypted
`
	c.Action = pull
}

func pull(ctx context.Context, cmd *cli.Command) error {
	ref := cmd.Args().First()
	if ref == "" || cmd.NArg() > 1 {
		return exit.Usagef("pull takes one image reference")
	}
	if cmd.Bool("all-platforms") && len(cmd.StringSlice("platform")) > 0 {
		return errBothPlatforms
	}
	if err := readPassword(cmd); err != nil {
		return err
	}
	return withClient(ctx, cmd, func(ctx context.Context, client *containerd.Client) error {
		conf, err := content.NewFetchConfig(ctx, cmd)
		if err != nil {
			return err
		}
		if !namesUser(cmd) {
			hosts, err := registryHosts(ctx, cmd)
			if err != nil {
				return err
			}
			conf.Resolver = docker.NewResolver(docker.ResolverOptions{Hosts: hosts})
		}
		if n := cmd.Int("max-concurrent-downloads"); n > 0 {
			conf.RemoteOpts = append(conf.RemoteOpts, containerd.WithMaxConcurrentDownloads(n))
		}
		img, err := content.Fetch(ctx, client, ref, conf)
		if err != nil {
			return err
		}
		wanted, err := wantedPlatforms(ctx, cmd, client, img.Target)
		if err != nil {
			return err
		}
		start := time.Now()
		for _, p := range wanted {
			fmt.Printf("unpacking %s %s...\n", platforms.FormatAll(p), img.Target.Digest)
			i, err := unpack(ctx, cmd, client, img, platforms.Only(p))
			if err != nil {
				return err
			}
			if cmd.Bool("print-chainid") {
				diffIDs, err := i.RootFS(ctx)
				if err != nil {
					return err
				}
				fmt.Printf("image chain ID: %s\n", identity.ChainID(diffIDs))
			}
		}
		fmt.Printf("done: %s\n", time.Since(start).Round(time.Millisecond))
		return nil
	})
}

// wantedPlatforms returns the platforms to unpack an image for.
func wantedPlatforms(ctx context.Context, cmd *cli.Command, client *containerd.Client, target ocispec.Descriptor) ([]ocispec.Platform, error) {
	if cmd.Bool("all-platforms") {
		all, err := images.Platforms(ctx, client.ContentStore(), target)
		return slices.DeleteFunc(all, func(p ocispec.Platform) bool { return p.OS == "unknown" }), err
	}
	wanted, err := platforms.ParseAll(cmd.StringSlice("platform"))
	if len(wanted) == 0 {
		wanted = []ocispec.Platform{platforms.DefaultSpec()}
	}
	return wanted, err
}

// wantedPlatform returns the one that --platform names, or the machine's own.
func wantedPlatform(cmd *cli.Command) (platforms.MatchComparer, error) {
	s := cmd.String("platform")
	if s == "" {
		return platforms.Default(), nil
	}
	spec, err := platforms.Parse(s)
	if err != nil {
		return nil, fmt.Errorf("--platform %s: %w", s, err)
	}
	return platforms.Only(spec), nil
}
